"""inspect.experts through its public call."""

import csv
from pathlib import Path

import pytest

import modelwright
from modelwright.cli import app as cli

TEXT = "the quick brown fox jumps over the lazy dog and runs away from the old house by the sea\n"


def text_file(folder: Path, name: str = "text.txt", words: str = TEXT) -> str:
    (folder / name).write_text(words * 12)
    return str(folder / name)


def test_published_routing_counts_give_the_published_divergence(shared: Path) -> None:
    found = modelwright.run("inspect.experts", routing=str(shared / "drop_upcycling_routing")).steps[0]["metrics"]["models"]
    bits = {model: round(row["divergence_bits"], 3) for model, row in found.items()}
    assert bits == {"DU-0.5-8x1.5B": 0.359, "FS-8x1.5B": 0.404, "NU-8x1.5B": 0.011}
    assert all(len(row["layers"]) == 24 for row in found.values())
    assert sum(row["cells_without_row"] for row in found.values()) == 160  # of 2880


def test_upcycled_copies_are_found_by_weights_and_outputs_and_said_as_advice(tmp_path: Path) -> None:
    modelwright.run("reshape.upcycle", base="seedling", to=tmp_path / "moe", experts=3, top_k=2)
    data = text_file(tmp_path)
    found = modelwright.run(
        "inspect.experts", base=tmp_path / "moe", data=data, tokens=64, dense="seedling", reorder="none", to=tmp_path / "out"
    )
    metrics = found.steps[0]["metrics"]
    for layer in metrics["layers"].values():
        assert layer["members"] == ["0", "1", "2", "dense"]
        for table in (*layer["matrix"].values(), *layer["neuron"].values(), layer["outputs"]["cosine"]):
            assert all(v == pytest.approx(1, abs=1e-6) for row in table for v in row)
        assert all(v == pytest.approx(1, abs=1e-3) for row in layer["outputs"]["angular"] for v in row)
        assert layer["r2"] == {"gate": None, "up": None, "down": None}
    assert [a["experts"] for a in metrics["advice"] if a["kind"] == "copies"] == [[0, 1, 2]] * 4
    assert not [a for a in metrics["advice"] if a["kind"] == "fewer" and "alike" in a["found"]]
    assert "copies of each other" in (tmp_path / "out" / "report.html").read_text()


def test_a_bf16_mixture_is_measured_and_domains_are_told_apart(tmp_path: Path) -> None:
    import torch

    from modelwright.core.model.checkpoint import Checkpoint

    Checkpoint("seedling").model(torch.bfloat16).save_pretrained(tmp_path / "base")
    for file in Checkpoint("seedling").companions():
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    modelwright.run("reshape.upcycle", base=tmp_path / "base", to=tmp_path / "moe", experts=4, method="drop", router="gate_means")
    domains = {"fox": text_file(tmp_path), "code": text_file(tmp_path, "code.txt", "def f(x): return self.x[i] + 1\n")}
    found = modelwright.run("inspect.experts", base=tmp_path / "moe", domains=domains, tokens=128, pairs=2).steps[0]["metrics"]
    assert 0 < found["domains"]["divergence_bits"] < 1
    assert found["r2"]["gate"] > max(found["r2"]["up"], found["r2"]["down"])  # the router was made from the gates
    layer = found["layers"]["0"]
    assert len(layer["reorder"]["neuron"]) == 2 and 0.2 < layer["matrix"]["gate"][0][1] < 0.7


def refuse(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(["inspect", "experts", *map(str, argv)])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and "Traceback" not in out + err
    return err.strip().splitlines()[-1]


def test_bad_input_is_one_sentence(capsys: pytest.CaptureFixture[str], tiny, tmp_path: Path) -> None:
    assert "nothing to inspect" in refuse(capsys)
    assert "has no experts to look into" in refuse(capsys, "--base", tiny("llama"))
    assert "has no experts to look into" in refuse(capsys, "--base", tiny("gpt2"))
    assert "no routing counts" in refuse(capsys, "--routing", tmp_path / "none.csv")
    assert "is a mixture of experts" in refuse(capsys, "--base", tiny("mixtral"), "--dense", tiny("olmoe"))
    assert "hidden size" in refuse(capsys, "--base", tiny("mixtral"), "--dense", "seedling")
    assert "no tokenizer" in refuse(capsys, "--base", tiny("mixtral"), "--data", text_file(tmp_path))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "holds no counts"),
        ([["m", "a", "0", "0", "3"]], "has one domain only"),
        ([["m", "a", "0", "0", "3"], ["m", "b", "0", "0", "x"]], "line 3"),
        ([["m", "a", "0", "0", "3"], ["m", "a", "0", "0", "4"]], "stands twice"),
        ([["m", "a", "0", "0", "3"], ["m", "b", "0", "0", "-1"]], "negative"),
        ([["m", "a", "0", "0", "3"], ["m", "b", "0", "0", "0"]], "counts no token of b in layer 0"),
    ],
)
def test_damaged_counts_are_refused(rows: list[list[str]], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with open(tmp_path / "c.csv", "w", newline="") as file:
        csv.writer(file).writerows([["model", "domain", "layer", "expert", "token_assignments"], *rows])
    assert words in refuse(capsys, "--routing", tmp_path / "c.csv")


def test_counts_without_a_column_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("model,domain,layer,expert,tokens\n")
    assert "no column 'token_assignments'" in refuse(capsys, "--routing", tmp_path / "c.csv")
