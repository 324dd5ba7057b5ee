"""Every method with tiny knobs: one row per registry entry, run by test_matrix.py over the families it fits."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DENSE = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Row:
    """Knobs small enough for a test; the families to run on; the test files that prove the method."""

    knobs: dict[str, Any]
    proofs: tuple[str, ...]
    families: tuple[str, ...] = DENSE
    data: bool | str = False  # True: token ids as data; or a name of what else is made
    loads_in: dict[str, str] = field(default_factory=dict)


_TRAIN = {"tokens": 64, "batch": 2, "context": 16, "lr": 1e-2, "save_every": 100, "warmup": 0.0}
_PAIRS = str(Path(__file__).parent / "reward" / "pairs.jsonl")
_DAYS = {"table": str(Path(__file__).parent / "modalities" / "days.csv"), "value": "value", "temperature": "temperature"}
_DOMAINS = str(Path(__file__).parent / "tune" / "domains.jsonl")
_TINY = Path(__file__).parent / "judge" / "tiny"
_TWIN = {"data": "openbezoar-twin", "recorded": "openbezoar-twin"}
ROWS: dict[str, Row] = {
    "curate.stdlib": Row({"parts": ["topics"], "characters": 2000}, ("tests/curate/test_stdlib.py",), families=("",)),
    "curate.extract": Row(
        {"pages": str(Path(__file__).parent / "curate" / "page.html"), "how": "plain"}, ("tests/curate/test_extract.py",), families=("",)
    ),
    "curate.rules": Row(
        {"use": ["c4.lorem_ipsum"]}, ("tests/curate/test_rules.py", "tests/curate/kernels/test_signals.py"), families=("",), data=True
    ),
    "curate.dedup": Row(
        {"threshold": 0.8}, ("tests/curate/test_dedup.py", "tests/curate/kernels/test_words.py"), families=("",), data=True
    ),
    "curate.safety": Row({}, ("tests/curate/test_safety.py",), families=("",), data=True),
    "curate.quality": Row({"learner": "GaussianNB"}, ("tests/curate/test_quality.py",), families=("",), data="graded"),
    "curate.web": Row({"rules": {"use": []}}, ("tests/curate/test_web.py",), families=("",), data=True),
    "curate.query": Row({}, ("tests/curate/test_query.py", "tests/curate/kernels/test_bm25.py"), families=("",), data="library"),
    "reshape.fresh": Row(
        {"vocab": 300, "hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 48, "context": 64, "norm": "mix"},
        ("tests/reshape/test_fresh.py", "tests/models/test_mix_ln.py"),
        families=("",),
        data=True,
    ),
    "reshape.grow": Row(
        {"operator": "net2net", "depth": 2, "hidden": 64},
        ("tests/reshape/test_grow.py", "tests/reshape/growth/test_growth_depth.py", "tests/reshape/growth/test_width.py"),
        families=(*DENSE, "gpt2", "phi3", "granite"),
    ),
    "reshape.growth_plan": Row(
        {"params": 7e9, "tokens": 2e12},
        ("tests/reshape/test_growth_plan.py",),
        families=("",),
    ),
    "reshape.gqa": Row(
        {"kv_heads": 1},
        ("tests/reshape/test_gqa.py", "tests/reshape/growth/test_align.py"),
        families=(*DENSE, "granite", "mixtral", "gemma2"),
    ),
    "reshape.upcycle": Row(
        {"experts": 4, "top_k": 2},
        ("tests/reshape/test_upcycle.py", "tests/reshape/experts/test_stock.py", "tests/reshape/experts/test_routers.py"),
        loads_in={
            "llama": "MixtralForCausalLM",
            "mistral": "MixtralForCausalLM",
            "qwen2": "Qwen2MoeForCausalLM",
            "qwen3": "Qwen3MoeForCausalLM",
        },
    ),
    "reshape.rmoe": Row(
        {"experts": 4, "p": 8},
        ("tests/models/test_rmoe.py",),
        families=("llama", "mistral", "mixtral"),
        loads_in=dict.fromkeys(("llama", "mistral", "mixtral"), "RMoEForCausalLM"),
    ),
    "reshape.hyper_moe": Row(
        {"a": 4, "b": 8, "e": 6, "hidden": 6, "q": 6, "init": "zero"},
        ("tests/models/test_hyper_moe.py",),
        families=("mixtral",),
        loads_in={"mixtral": "HyperMoEForCausalLM"},
    ),
    "tune.full": Row(
        {"train": _TRAIN},
        ("tests/core/train/test_loop.py", "tests/tune/test_tune.py"),
        families=(*DENSE, "gpt2", "gpt_neox", "opt", "mixtral"),
        data=True,
    ),
    "tune.hft": Row(
        {"train": _TRAIN}, ("tests/tune/test_hft.py",), families=(*DENSE, "gpt2", "gpt_neox", "phi3", "mixtral", "qwen3_moe"), data=True
    ),
    "tune.migu": Row(
        {"train": _TRAIN, "guard": "update"}, ("tests/tune/test_migu.py",), families=(*DENSE, "gpt2", "gpt_neox", "phi3", "opt"), data=True
    ),
    "tune.key_value": Row({"train": _TRAIN}, ("tests/tune/test_key_value.py",), families=(*DENSE, "gpt2", "phi3", "mixtral"), data=True),
    "tune.masked": Row({"train": _TRAIN, "ramp": 1}, ("tests/tune/test_masked.py",), families=()),  # needs a model grown by masks
    "tune.new_blocks": Row(
        {"train": _TRAIN, "blocks": [1]}, ("tests/tune/test_new_blocks.py",), families=(*DENSE, "gpt2", "mixtral"), data=True
    ),
    "tune.masks": Row(
        {"train": _TRAIN, "experts": 2, "top_k": 1, "hard": 0.5},
        ("tests/tune/test_masks.py", "tests/tune/pruning/test_mixture.py", "tests/core/train/test_constraint.py"),
        families=(*DENSE, "granite"),
        data=True,
        loads_in={
            "llama": "GraniteMoeSharedForCausalLM",
            "mistral": "GraniteMoeSharedForCausalLM",
            "granite": "GraniteMoeSharedForCausalLM",
            "qwen2": "Qwen2MoeForCausalLM",
            "qwen3": "Qwen3MoeForCausalLM",
        },
    ),
    "tune.dha": Row(
        {"train": _TRAIN | {"tokens": 128}, "budget": 0.5, "search": 1},
        ("tests/tune/test_dha.py", "tests/tune/heads/test_grouping.py", "tests/models/test_dha_models.py"),
        data=True,
        loads_in={k: f"Dha{k.title()}ForCausalLM" for k in DENSE},
    ),
    "tune.shear": Row(
        {"train": _TRAIN, "layers": 1, "heads": 2, "ffn": 24, "hidden": 24},
        ("tests/tune/test_shear.py", "tests/tune/pruning/test_smaller.py", "tests/core/train/test_constraint.py"),
        families=(*DENSE, "granite"),
        data=True,
    ),
    "tune.dynamic_batch": Row(
        {"train": _TRAIN, "domain": "kind", "holdout": 0.2, "data": {"path": _DOMAINS, "column": "input_ids"}},
        ("tests/tune/test_dynamic_batch.py",),
        families=(*DENSE, "gpt2", "mixtral"),
    ),
    "tune.ssd": Row(
        {"train": _TRAIN, "experts": 4, "top_k": 2, "check_every": 1, "stable": -1.0, "zeros": 0.0, "final_dense": 0.0},
        ("tests/tune/test_ssd.py", "tests/tune/neurons/test_layer.py"),
        families=(*DENSE, "gpt2", "phi3", "gpt_neox"),
        data=True,
    ),
    "tune.c_rlft": Row(
        {"train": _TRAIN | {"context": 64}, "weights": {"good": 1.0, "bad": 0.1}, "conditions": {"good": "Good", "bad": "Bad"}},
        ("tests/tune/test_c_rlft.py", "tests/core/data/test_packing.py"),
        families=("seedling",),
        data="chats",
    ),
    "tune.sftmix": Row(
        {"train": _TRAIN},
        ("tests/tune/test_sftmix.py", "tests/tune/test_mixed_processes.py"),
        families=(*DENSE, "gpt2", "gemma2", "mixtral"),
        data=True,
    ),
    "tune.moi": Row(
        {"train": _TRAIN | {"context": 96}, "systems": {"sums": "You add.", "talk": "You talk."}},
        ("tests/tune/test_moi.py",),
        families=("seedling",),
        data="domains",
    ),
    "tune.spiel": Row(
        {"train": _TRAIN, "rank": 1, "reselect": 2, "window": 1},
        ("tests/tune/test_spiel.py", "tests/tune/test_mixed_processes.py"),
        families=(*DENSE, "gpt2", "phi3", "mixtral"),
        data=True,
    ),
    "tune.mix": Row({"train": _TRAIN, "methods": ["hft", {"migu": {"guard": "update"}}]}, ("tests/tune/test_mix.py",), data=True),
    "tune.balance": Row(
        {"train": _TRAIN},
        ("tests/tune/test_balanced.py", "tests/moe/test_balance.py"),
        families=("mixtral", "qwen2_moe", "granitemoe"),
        data=True,
    ),
    "tune.gw_moe": Row(
        {"train": _TRAIN, "threshold": 0.5, "unit": "share"},
        ("tests/tune/rerouting/test_rerouted.py", "tests/moe/test_uncertain.py"),
        families=("mixtral", "qwen2_moe", "qwen3_moe", "granitemoe"),
        data=True,
    ),
    "tune.rectify": Row(
        {"train": _TRAIN, "factor": 0.5},
        ("tests/tune/rerouting/test_rerouted.py", "tests/moe/test_rectify.py", "tests/moe/test_parallel.py"),
        families=("mixtral", "qwen3_moe", "granitemoe"),
        data=True,
    ),
    "tune.lora_moe": Row(
        {"train": _TRAIN, "experts": 2, "r": 2},
        ("tests/tune/test_lora_moe.py",),
        data=True,
        loads_in={k: f"LoraMoe{k.title()}ForCausalLM" for k in DENSE},
    ),
    "reshape.upit": Row(
        {"experts": 3, "seed_rows": 6, "context": 16, "epochs": 1},
        ("tests/reshape/test_upit.py", "tests/reshape/experts/test_population.py"),
        families=("seedling",),
        data="checkpoints",
        loads_in={"seedling": "MixtralForCausalLM"},
    ),
    "tune.knife": Row(
        {"train": _TRAIN | {"context": 64}, "way": "teacher"}, ("tests/tune/test_knife.py",), families=("seedling",), data="questions"
    ),
    "tune.map_tuning": Row(
        {"train": _TRAIN | {"context": 64}},
        ("tests/tune/test_map_tuning.py", "tests/tune/entities/test_mentions.py"),
        families=("seedling",),
        data="entities",
    ),
    "tune.ernie_code": Row(  # needs a T5
        {"train": _TRAIN},
        ("tests/tune/test_ernie_code.py", "tests/tune/spans/test_corrupt.py", "tests/tune/spans/test_whitespace.py"),
        families=(),
    ),
    "inspect.map_tuning": Row({}, ("tests/inspect/test_published_maps.py",), families=("",), data="plugged"),
    "reshape.half_reset": Row({"pretrained": "BASE"}, ("tests/reshape/test_half_reset.py",), families=(*DENSE, "gpt2", "phi3", "mixtral")),
    "reshape.edit": Row({"fact": "FACT", "steps": 3}, ("tests/reshape/test_edit.py",), families=("seedling",), data="fact"),
    "judge.continual": Row({"matrix": "MATRIX"}, ("tests/judge/test_continual.py",), families=("",), data="matrix"),
    "judge.frontier": Row(
        {"ways": ["hft"], "lrs": [1e-2], "seeds": 1, "held": 3, "train": _TRAIN},
        ("tests/judge/test_frontier.py",),
        families=("llama", "gpt2"),
        data=True,
    ),
    "tune.lora": Row({"train": _TRAIN, "r": 2}, ("tests/tune/test_tune.py",), families=(*DENSE, "gpt2", "phi3"), data=True),
    "inspect.scaling_law": Row(
        {"losses": str(Path(__file__).parent / "inspect" / "tiny_losses.json")}, ("tests/inspect/test_scaling_law.py",), families=("",)
    ),
    "inspect.depth": Row({"context": 16}, ("tests/inspect/test_depth.py",), families=(*DENSE, "gpt2", "gemma2", "mixtral")),
    "tune.dpo": Row(
        {"train": _TRAIN | {"tokens": 200, "context": 64}}, ("tests/tune/test_dpo.py",), families=("seedling",), data="answers"
    ),
    "reward.train": Row(
        {"train": _TRAIN | {"tokens": 200, "context": 64}, "debias": "pbc"},
        ("tests/reward/test_reward_train.py", "tests/models/test_reward_model.py"),
        families=("seedling",),
        data="answers",
        loads_in={"seedling": "RewardModel"},
    ),
    "reward.themis_train": Row(
        {"train": _TRAIN | {"tokens": 400, "context": 512}},
        ("tests/reward/test_themis_train.py", "tests/reward/tools/test_traces.py"),
        families=("seedling",),
        data="traces",
        loads_in={"seedling": "ToolRewardModel"},
    ),
    "reward.themis": Row({}, ("tests/reward/test_themis.py", "tests/reward/tools/test_tools.py"), families=("",), data="recorded"),
    "reward.calibrate": Row(
        {"scores": _PAIRS, "frac": 0.5},
        ("tests/reward/test_calibrate.py", "tests/reward/table/test_scores.py", "tests/reward/table/test_wrapper.py"),
        families=("",),
    ),
    "judge.llmbar": Row(
        {"replay": str(_TINY)},
        (
            "tests/judge/test_llmbar.py",
            "tests/judge/ask/test_verdict.py",
            "tests/core/ask/test_judges.py",
            "tests/core/ask/test_endpoint.py",
        ),
        families=("",),
    ),
    "judge.select": Row({"chains": str(_TINY / "chains.jsonl"), "kind": "letters"}, ("tests/judge/test_select.py",), families=("",)),
    "judge.aor": Row(
        {"chains": str(_TINY / "chains.jsonl"), "kind": "letters", "verifier": "letters"}, ("tests/judge/test_aor.py",), families=("",)
    ),
    "reward.bench": Row(
        {"suite": "rewardbench", "scores": _PAIRS, "ratio": 0.5, "draws": 100}, ("tests/reward/test_reward_bench.py",), families=("",)
    ),
    "rl.ppo": Row(
        {
            "train": {"batch": 4, "lr": 1e-2, "warmup": 0.0, "save_every": 100},
            "reward_function": "modelwright.rl.rollout.examples:letters",
            "response_tokens": 6,
            "updates": 2,
        },
        ("tests/rl/test_ppo.py", "tests/rl/test_macro.py", "tests/rl/test_rollout.py"),
        families=(*DENSE, "gpt2", "mixtral"),
        data=True,
    ),
    "cache.generate": Row(
        {"prompt": "def read(self, size=-1):\n" * 6, "keep": 0.3, "max_new_tokens": 4},
        (
            "tests/cache/engine/test_evict.py",
            "tests/cache/evictors/test_baselines.py",
            "tests/cache/evictors/test_nacl.py",
            "tests/cache/test_generate.py",
        ),
        families=("seedling",),
    ),
    "cache.bench": Row(
        {
            "methods": ["nacl", "random"],
            "keep": [0.5],
            "context": 12,
            "continuation": 8,
            "tasks": ["recall"],
            "rows": 2,
        },
        ("tests/cache/engine/test_suite.py", "tests/cache/test_bench.py"),
        families=(*DENSE, "gpt2", "phi3", "gemma2", "mixtral"),
        data=True,
    ),
    "inspect.experts": Row(
        {"tokens": 48, "context": 24, "pairs": 3},
        (
            "tests/inspect/test_inspect_experts.py",
            "tests/inspect/mixture/test_expert_weights.py",
            "tests/inspect/mixture/test_expert_outputs.py",
        ),
        families=("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "granitemoeshared"),
        data=True,
    ),
    "inspect.modularity": Row(
        {"examples": str(Path(__file__).parent / "inspect" / "functions" / "examples.jsonl")}
        | {"experts": 4, "top": 0.1, "partitions": 5, "disturb": [0.1], "draws": 1},
        (
            "tests/inspect/test_modularity.py",
            "tests/inspect/functions/test_predictivity.py",
            "tests/inspect/functions/test_groups.py",
            "tests/moe/test_partition.py",
        ),
        families=(*DENSE, "gpt2", "opt", "phi3", "bert", "t5", "mixtral", "granitemoe"),
    ),
    "modalities.backcast": Row(
        _DAYS | {"learner": "Ridge", "hide": [2021]},
        ("tests/modalities/test_backcast.py", "tests/modalities/series/test_daily.py", "tests/modalities/series/test_totals.py"),
        families=("",),
    ),
    "modalities.critical_temperature": Row(
        _DAYS | {"draws": 100},
        ("tests/modalities/test_critical_temperature.py", "tests/modalities/series/test_hinge.py"),
        families=("",),
    ),
    "curate.lamini": Row({**_TWIN, "size": 8, "ask": 8}, ("tests/curate/test_openbezoar.py",), families=("",)),
    "curate.evol": Row({**_TWIN, "rounds": 1}, ("tests/curate/test_openbezoar.py",), families=("",)),
    "curate.orca": Row({**_TWIN, "messages": 2}, ("tests/curate/test_openbezoar.py",), families=("",)),
    "curate.judge_filter": Row({**_TWIN, "ask": "yes_no"}, ("tests/curate/test_openbezoar.py",), families=("",)),
    "inspect.multilingual": Row(
        {},
        ("tests/inspect/test_multilingual.py", "tests/inspect/languages/test_language_measures.py"),
        families=("seedling",),
        data="languages",
    ),
    "curate.instructors": Row(
        {"sample_size": 4},
        ("tests/curate/test_instructors.py", "tests/curate/generators/test_grading.py", "tests/curate/generators/test_task_forms.py"),
        families=("",),
        data="lessons",
    ),
    "inspect.influence": Row({"epochs": 10}, ("tests/inspect/test_influence.py",), families=("", "seedling"), data="dynamics"),
    "modalities.music": Row(
        {"length": 512, "widths": [8, 16], "stem": 4, "layers": 1, "each": 1, "steps": 2, "train": {"epochs": 1, "batch": 8}},
        ("tests/modalities/test_music.py",),
        families=("", "seedling"),
        data="tones",
    ),
    "modalities.pixels": Row(
        {"train": _TRAIN, "patch": 8, "font_size": 7, "patches": 12},
        ("tests/modalities/test_pixels.py",),
        families=("llama", "seedling"),
        data="text",
        loads_in=dict.fromkeys(("llama", "seedling"), "PixelLlamaForCausalLM"),
    ),
    "modalities.taptap": Row(
        {"table": str(Path(__file__).parent / "modalities" / "people.csv"), "layers": 1, "hidden": 16, "heads": 2}
        | {"backbone": "DecisionTree", "train": {"epochs": 1, "batch": 16, "lr": 1e-3}},
        ("tests/modalities/test_taptap.py",),
        families=("",),
    ),
    "reshape.moefy": Row(
        {"experts": 6, "top_k": 2, "router": "ridge", "context": 16},
        ("tests/reshape/test_moefy.py", "tests/reshape/experts/test_split.py", "tests/moe/test_partition.py"),
        families=(*DENSE, "granite", "phi3"),
        data=True,
        loads_in={
            "llama": "GraniteMoeForCausalLM",
            "mistral": "GraniteMoeForCausalLM",
            "granite": "GraniteMoeForCausalLM",
            "phi3": "GraniteMoeForCausalLM",
            "qwen2": "Qwen2MoeForCausalLM",
            "qwen3": "Qwen3MoeForCausalLM",
        },
    ),
}
