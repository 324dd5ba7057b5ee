"""A fitted calibrator inside TRL's own trainers: as a reward function, as a reward model, and evaluated by RewardTrainer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelwright.reward.calibrate import Calibrator
from modelwright.reward.table.wrapper import CalibratedFunction, CalibratedModel

LENGTHS = np.arange(5.0, 205.0)


def fitted(feature: str) -> Calibrator:
    return Calibrator(features=(feature,), it=0).fit(3 + 0.5 * LENGTHS, {feature: LENGTHS})


@pytest.fixture(scope="module")
def tokenizer(stories: Path) -> Any:
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(stories)
    made.pad_token = made.pad_token or made.eos_token
    return made


def grpo(stories: Path, tokenizer: Any, folder: Path, reward: Any, **more: Any) -> dict[str, float]:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    knobs = {"max_steps": 1, "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8, "logging_steps": 1}
    args = GRPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, **knobs)
    data = Dataset.from_dict({"prompt": ["Once upon a time"] * 4})
    trainer = GRPOTrainer(model=str(stories), reward_funcs=[reward], args=args, train_dataset=data, processing_class=tokenizer, **more)
    trainer.train()
    return trainer.state.log_history[0]


def test_a_reward_that_is_all_length_is_nothing_to_grpo(stories: Path, tokenizer: Any, tmp_path: Path) -> None:
    def longer_is_better(completions: list[str], **_: Any) -> list[float]:
        return [3 + 0.5 * len(c) for c in completions]

    plain = grpo(stories, tokenizer, tmp_path, longer_is_better)
    calibrated = grpo(stories, tokenizer, tmp_path, CalibratedFunction(longer_is_better, fitted("length")))
    assert plain["reward"] > 5 and abs(calibrated["reward"]) < 1e-4


def test_a_calibrated_model_rewards_and_is_trained(stories: Path, tokenizer: Any, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    model = AutoModelForSequenceClassification.from_pretrained(stories, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    calibrated = CalibratedModel(model, fitted("tokens"))
    log = grpo(stories, tokenizer, tmp_path, calibrated, reward_processing_classes=[tokenizer])
    assert log["reward"] < -5  # a model without a length bias is charged for the one that was fitted
    pairs = Dataset.from_dict({"chosen": ["Once there was a dog."] * 4, "rejected": ["No."] * 4})
    args = RewardConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = RewardTrainer(model=calibrated, args=args, train_dataset=pairs, processing_class=tokenizer)
    trainer.train()
    assert np.isfinite(trainer.state.log_history[0]["loss"])
