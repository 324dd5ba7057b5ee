"""Published numbers from recorded scores, and suites against a literal count."""

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import modelwright
from modelwright.core.errors import UserError
from modelwright.reward.suites.length_control import Annotations, length_controlled

JUDGEBENCH = {  # raw, RC-LWR with frac 1.0, penalty of 0.001 a character
    "Ray2333_GRM-Gemma-2B-rewardmodel-ft": (59.43, 61.43, 56.29),
    "Skywork_Skywork-Reward-Gemma-2-27B": (64.29, 64.57, 64.00),
    "Skywork_Skywork-Reward-Llama-3.1-8B": (62.29, 60.86, 62.00),
}


def bench(suite: str, scores: Path | str, **knobs) -> dict:
    return modelwright.run("reward.bench", suite=suite, scores=str(scores), **knobs).plain()["metrics"]


def test_judgebench_accuracies_are_the_published_ones_and_calibration_decorrelates(shared: Path) -> None:
    found = bench("judgebench", shared / "judgebench_rm" / "scores.jsonl")["models"]
    for model, expected in JUDGEBENCH.items():
        assert tuple(round(found[model][k]["accuracy"], 2) for k in ("raw", "lwr", "penalty")) == expected
        assert abs(found[model]["lwr"]["spearman"]["length"]) <= 0.03
        assert {"mean", "penalty+lwr"} < set(found[model]) and set(found[model]["raw"]["sections"]) == {
            "knowledge",
            "reasoning",
            "math",
            "coding",
        }
    assert [found[m]["rank"]["lwr"] for m in JUDGEBENCH] == [2, 1, 3]


def test_judgebench_command_prints_json_without_torch(shared: Path) -> None:
    code = (
        "import sys\nfrom modelwright.cli.app import main\ntry: main(sys.argv[1:])\nexcept SystemExit as e: assert not e.code, e.code\n"
        "heavy = {m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'scipy', 'statsmodels', 'sklearn', 'pandas'}\n"
        "assert not heavy, heavy"
    )
    arguments = ["reward", "bench", "judgebench", "--scores", str(shared / "judgebench_rm" / "scores.jsonl"), "--json"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(json.loads(done.stdout)["metrics"]["models"]) == 3


def test_rewardbench_sections_come_out_with_new_and_old_counts(shared: Path) -> None:
    models = bench("rewardbench", shared / "rewardbench_misc")["models"]
    best, small = (models[f"general-preference/{m}"]["raw"] for m in ("GPM-Gemma-2-9B", "GPM-Gemma-2-2B"))
    assert {k: round(v, 2) for k, v in best["sections"].items()} == {
        "Chat": 93.58, "Chat Hard": 87.72, "Safety": 92.3, "Reasoning": 95.71, "Safety, old": 91.75, "mean, old": 92.19
    }  # fmt: skip
    assert round(best["accuracy"], 3) == 92.326
    assert (round(small["sections"]["Safety"], 2), round(small["sections"]["Safety, old"], 2)) == (87.97, 86.75)


def test_rewardbench_scores_give_the_sections_of_their_subset_accuracies(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    subsets = [
        "alpacaeval-easy",
        "mt-bench-med",
        "llmbar-natural",
        "donotanswer",
        "xstest-should-refuse",
        "xstest-should-respond",
        "math-prm",
        "hep-go",
    ]
    subsets = [*(s for s in subsets for _ in range(30)), *["shp"] * 30]
    a, b = rng.normal(0.3, 1, len(subsets)), rng.normal(0, 1, len(subsets))
    share = {s: float(np.mean([x > y for x, y, z in zip(a, b, subsets, strict=True) if z == s])) for s in set(subsets)}
    texts = ["x" * int(n) for n in rng.integers(5, 500, len(subsets))]
    whole = {
        "subset": subsets,
        "id": list(range(len(subsets))),
        "scores_chosen": [[x] for x in a],
        "scores_rejected": b.tolist(),
        "model": "m",
    }
    whole |= {"text_chosen": texts, "text_rejected": texts[::-1]}
    (tmp_path / "in" / "org").mkdir(parents=True)
    (tmp_path / "in" / "org" / "scored.json").write_text(json.dumps(whole))
    (tmp_path / "in" / "counted.json").write_text(json.dumps(share))
    (tmp_path / "in" / "other.json").write_text('{"x": {"y": 1}}')
    models = bench("rewardbench", tmp_path / "in", draws=100)["models"]
    assert set(models) == {"org/scored", "counted"}
    assert models["org/scored"]["raw"]["accuracy"] == pytest.approx(models["counted"]["raw"]["accuracy"])
    assert models["org/scored"]["raw"]["sections"] == pytest.approx(models["counted"]["raw"]["sections"])
    prior = share["shp"]
    assert models["counted"]["raw"]["sections"]["Prior Sets"] == pytest.approx(100 * prior)
    own = [{"id": i, "subset": s, "chosen": c, "rejected": r} for i, (s, c, r) in enumerate(zip(subsets, texts, texts[::-1], strict=True))]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in own))
    joined = bench("rewardbench", tmp_path / "in" / "org" / "scored.json", texts=str(tmp_path / "texts.jsonl"), draws=100)["models"][
        "scored"
    ]
    assert joined["lwr"]["spearman"] == models["org/scored"]["lwr"]["spearman"]


def rmbench_scores(shared: Path, folder: Path, reward) -> tuple[Path, list[dict]]:
    """Scores by `reward(text, is_chosen)` for the real texts, a file per domain."""
    folder.mkdir()
    every = []
    for file in sorted((shared / "rmbench").glob("*.json.gz")):
        rows = json.loads(gzip.decompress(file.read_bytes()))
        domain = file.name.split(".")[0]
        scored = [
            {"id": r["id"], "score_chosen": [reward(t, 1) for t in r["chosen"]], "score_rejected": [reward(t, 0) for t in r["rejected"]]}
            for r in rows
        ]
        (folder / f"{domain}_filtered.json").write_text(json.dumps(scored))
        every += [r | {"domain": domain} for r in scored]
    return folder, every


def test_rmbench_counts_as_its_authors_do(shared: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path, rows = rmbench_scores(shared, tmp_path / "s", lambda text, chosen: float(np.log(len(text)) + 0.3 * chosen + rng.normal(0, 0.5)))
    found = bench("rmbench", path, texts=str(shared / "rmbench"), draws=100)["models"]["s"]
    levels = {}
    for domain in ("chat", "code", "safety-refuse", "safety-response"):
        matrix = np.zeros((3, 3))
        of = [r for r in rows if r["domain"] == domain]
        for r in of:
            for i in range(3):
                for j in range(3):
                    matrix[i, j] += r["score_chosen"][i] > r["score_rejected"][j]
        matrix *= 100 / len(of)
        levels[domain] = (np.tril(matrix, -1).sum() / 3, np.diag(matrix).mean(), np.triu(matrix, 1).sum() / 3)
    safety = np.mean([levels["safety-refuse"], levels["safety-response"]], axis=0)
    domains = np.array([levels["chat"], levels["code"], safety])
    assert found["raw"]["accuracy"] == pytest.approx(domains.mean())
    expected = dict(zip(("chat", "code", "safety"), domains.mean(1), strict=True)) | dict(
        zip(("easy", "normal", "hard"), domains.mean(0), strict=True)
    )
    assert found["raw"]["sections"] == pytest.approx(expected)
    gap = {k: found[k]["sections"]["easy"] - found[k]["sections"]["hard"] for k in ("raw", "lwr")}
    assert gap["lwr"] < 0.5 * gap["raw"], "a reward for length shows as easy over hard, and calibration takes it back"


def alpaca(shared: Path, *names: str) -> list[Path]:
    return [shared / "alpacaeval2" / n for n in names]


def test_alpacaeval_raw_and_length_controlled_rates_meet_the_leaderboard(shared: Path) -> None:
    pairs, board, weights = alpaca(shared, "pairs.csv.gz", "leaderboard_v2.csv", "lc_glm_weights.csv")
    arena = map(str, alpaca(shared, "chatbot_arena_lb_0828.csv", "chatbot_arena_lb_style_length.csv", "benchmarks.csv"))
    found = bench("alpacaeval", pairs, leaderboard=str(board), weights=str(weights), arena=list(arena))
    raw, controlled = found["leaderboard"]["raw"], found["leaderboard"]["length-controlled"]
    assert raw["models"] == controlled["models"] == 57
    assert raw["largest"] < 1e-6 and controlled["mean_absolute_error"] <= 0.35 and controlled["largest"] < 0.5
    with open(board) as file:
        rows = {r[""]: r for r in csv.DictReader(file)}
    for m in found["models"].keys() & rows.keys():
        assert found["models"][m]["raw"]["standard_error"] == pytest.approx(float(rows[m]["standard_error"]), abs=1e-6)
    assert found["correlation"]["length-controlled"]["leaderboard"]["spearman"] > 0.999
    assert {"chatbot_arena_lb_0828", "chatbot_arena_lb_style_length"} < set(found["correlation"]["penalty"])
    assert found["gameability"]["length-controlled"] < found["gameability"]["raw"]


def test_alpacaeval_own_fit_is_near_the_official_rates_and_a_model_alone_gets_none(shared: Path, tmp_path: Path) -> None:
    pairs, board = alpaca(shared, "pairs.csv.gz", "leaderboard_v2.csv")
    found = bench("alpacaeval", pairs, leaderboard=str(board), draws=100)
    assert found["leaderboard"]["length-controlled"]["mean_absolute_error"] < 1.0
    lines = gzip.decompress(pairs.read_bytes()).decode().splitlines()
    (tmp_path / "one.csv").write_text("\n".join([lines[0], *(line for line in lines if line.startswith("claude,"))]))
    alone = modelwright.run("reward.bench", suite="alpacaeval", scores=tmp_path / "one.csv", draws=100)
    assert "length-controlled" not in alone.plain()["metrics"]["models"]["claude"] and "10 models or more" in alone.steps[0]["text"]


def test_length_control_finds_the_rates_that_made_the_annotations(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    models, n = 14, 400
    difficulty, w3, w1 = rng.normal(0, 1, n), rng.normal(-0.5, 0.8, models), -1.5
    rows, truth = [], []
    for m in range(models):
        gap = rng.normal(200 * (m - 7), 500, n).round()
        logit = w1 * np.tanh(gap / gap.std(ddof=1)) + difficulty + w3[m]
        truth.append(100 * np.mean(1 / (1 + np.exp(-difficulty - w3[m]))))
        p = 1 / (1 + np.exp(-logit))
        rows += [f"m{m},{i},{1 + p[i]:.8f},{2000 + gap[i]},2000" for i in range(n)]
    (tmp_path / "a.csv").write_text("\n".join(["model,instruction,preference,len_base,len_model", *rows]))
    rates, weights = length_controlled(Annotations(tmp_path / "a.csv", {}))
    assert np.abs(100 * rates.mean(1) - truth).max() < 0.5 and weights[:, 0] == pytest.approx(w1, abs=0.1)


def test_the_length_gap_is_scaled_by_the_sample_s_deviation(tmp_path: Path) -> None:
    """As AlpacaEval does: the deviation of n gaps divides by n - 1."""
    rows = [
        {"model": "m", "instruction": i, "preference": 1.5, "len_base": 1000 + gap, "len_model": 1000}
        for i, gap in enumerate((100, -200, 400))
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert Annotations(tmp_path / "a.json", {}).tanh[0] == pytest.approx(np.tanh([1 / 3, -2 / 3, 4 / 3]))


def test_two_instructions_that_were_won_make_nothing_certain(tmp_path: Path) -> None:
    rows = [{"model": "m", "instruction": i, "preference": 2.0, "len_base": 1, "len_model": 1 + i} for i in range(2)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    found = bench("alpacaeval", tmp_path / "a.json", draws=100)["models"]["m"]["raw"]
    assert found["win_rate"] == 100 and found["interval"] == pytest.approx([34.24, 100], abs=0.01)


def test_alpacaeval_reads_annotations_and_judges_by_a_reward_model(tmp_path: Path) -> None:
    annotations = [
        {"instruction": f"q{i}", "output_1": "ab", "output_2": "abc", "generator_1": "base", "generator_2": "m", "preference": p}
        for i, p in enumerate((1.0, 2.0, 0.0, None))
    ]
    (tmp_path / "annotations.json").write_text(json.dumps(annotations))
    found = bench("alpacaeval", tmp_path / "annotations.json", draws=100)["models"]["m"]
    assert found["raw"]["win_rate"] == pytest.approx(50) and found["instructions"] == 3 and found["length"] == 3
    rng = np.random.default_rng(0)
    rows = ["model,instruction,score_base,score_model,len_base,len_model"]
    for m in range(3):
        for i in range(100):
            a, b = rng.integers(100, 3000, 2)
            rows.append(f"m{m},{i},{0.002 * a + rng.normal()},{0.002 * b + m + rng.normal()},{a},{b}")
    (tmp_path / "s.csv").write_text("\n".join(rows))
    models = bench("alpacaeval", tmp_path / "s.csv", draws=100)["models"]
    even = [models["m0"][k]["win_rate"] for k in ("lwr", "mean")]
    assert even == pytest.approx([50, 50], abs=6) and models["m2"]["lwr"]["win_rate"] > models["m0"]["lwr"]["win_rate"] + 20


JUDGED = {"label": "A>B", "source": "x", "scores": [1, 2], "len_A": 1, "len_B": 2}
PAIR = {"scores_chosen": 1, "scores_rejected": 0, "text_chosen": "a", "text_rejected": "b"}
STYLES = {"id": 1, "score_chosen": [1, 2, 3], "score_rejected": [1, 2, 3]}
ANNOTATED = {"model": "m", "instruction": 1, "preference": 1.5, "len_base": 1, "len_model": 1}


@pytest.mark.parametrize(
    ("suite", "row", "said"),
    [
        ("judgebench", JUDGED | {"label": "A"}, "the label 'A', because it must be A>B or B>A"),
        ("judgebench", JUDGED | {"scores": {"m": [1]}}, "has no two scores by m"),
        ("judgebench", JUDGED | {"scores": [1, None]}, "is None, because a finite number"),
        ("judgebench", {k: v for k, v in JUDGED.items() if "len" not in k}, "no column 'response_A'"),
        ("judgebench", JUDGED | {"len_B": 1}, "values of the feature 'length' are equal"),
        ("rewardbench", PAIR, "no column 'subset'"),
        ("rewardbench", PAIR | {"subset": "x"}, "none of RewardBench's subsets"),
        ("rmbench", STYLES | {"score_chosen": [1, 2]}, "no three scores in 'score_chosen'"),
        ("rmbench", STYLES, "has no column 'chosen'"),
        ("judgebench", JUDGED | {"pair_id": "x"}, "pair_id 'x' stands twice"),
        ("judgebench", JUDGED | {"scores": [1, 10**400]}, "is beyond 1e100"),
        ("rmbench", STYLES | {"score_chosen": [1, 2, 1e308]}, "is beyond 1e100"),
        ("alpacaeval", ANNOTATED | {"preference": 3}, "a preference .* is 3"),
        ("alpacaeval", ANNOTATED | {"preference": None}, "m has no preference"),
    ],
)
def test_a_bad_row_of_a_suite_is_one_sentence(suite: str, row: dict, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text((json.dumps(row) + "\n") * 2 if suite == "judgebench" else json.dumps(row) + "\n")
    with pytest.raises(UserError, match=said):
        bench(suite, tmp_path / "a.jsonl")


def test_missing_or_foreign_files_are_one_sentence(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text((json.dumps(ANNOTATED) + "\n") * 2)
    with pytest.raises(UserError, match="m has instruction '1' twice"):
        bench("alpacaeval", tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="no file at"):
        bench("judgebench", tmp_path / "none.jsonl")
    (tmp_path / "empty").mkdir()
    for text, said in (
        ('{"mt-bench-hard": 7}', "the accuracy of mt-bench-hard in .* is 7, because it must be a share"),
        ('{"mt-bench-hard": true}', "is True, because it must be a share"),
        ('{"mt-bench-hard": NaN}', "is nan, because it must be a share"),
        ("[" * 100_000, "does not parse"),
    ):
        (tmp_path / "shares.json").write_text(text)
        with pytest.raises(UserError, match=said):
            bench("rewardbench", tmp_path / "shares.json")
    (tmp_path / "twice.jsonl").write_text((json.dumps(STYLES | {"chosen": ["a"] * 3, "rejected": ["b"] * 3}) + "\n") * 2)
    with pytest.raises(UserError, match="id 1 stands twice"):
        bench("rmbench", tmp_path / "twice.jsonl")
    with pytest.raises(UserError, match="holds no json"):
        bench("rewardbench", tmp_path / "empty")
    pairs, board = alpaca(shared, "pairs.csv.gz", "leaderboard_v2.csv")
    with pytest.raises(UserError, match="no column 'np.tanh"):
        bench("alpacaeval", pairs, weights=str(board))
    lines = alpaca(shared, "lc_glm_weights.csv")[0].read_text().splitlines()
    (tmp_path / "weights.csv").write_text("\n".join([*lines, lines[-1]]))
    with pytest.raises(UserError, match="stands twice in"):
        bench("alpacaeval", pairs, weights=str(tmp_path / "weights.csv"))
    with pytest.raises(UserError, match="no column that starts with 'Arena'"):
        bench("alpacaeval", pairs, arena=[str(board)])
    with pytest.raises(UserError, match="'judgbench' is not a choice; did you mean 'judgebench'"):
        bench("judgbench", pairs)
