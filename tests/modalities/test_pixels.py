"""Pixels: patches and their order, what must not matter and what must, text as in Llama, and every way to train on them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import modelwright
from families import model_of
from modelwright.core.data.rows import IGNORE, PaddedDataset
from modelwright.core.errors import UserError
from modelwright.core.knobs import Train
from modelwright.core.model.anatomy import Anatomy
from modelwright.core.model.checkpoint import Checkpoint
from modelwright.core.train.loop import fit
from modelwright.core.train.technique import Technique
from modelwright.modalities.pixels import Knobs, Pixels, generate, image_of
from modelwright.modalities.rendering.rows import PixelObjective, PixelRows, TokenTerm
from modelwright.modalities.rendering.text import Renderer, check_script, default_font
from modelwright.models.pixels import PixelLlamaForCausalLM, patchify, targets, unpatchify

P = 8
TEXTS = ["one apple", "two boats and more", "x", "a drum, an egg"]


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(size=7, patch=P)


@pytest.fixture(scope="module")
def model() -> PixelLlamaForCausalLM:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return PixelLlamaForCausalLM.from_llama(model_of("llama"), patch_size=P, num_classes=3).eval()


def rows(renderer: Renderer, patches: bool = True, tokens: bool = False) -> PixelRows:
    seen = [torch.from_numpy(renderer(t)[0]) if patches else torch.zeros(0, 3 * P * P, dtype=torch.uint8) for t in TEXTS]
    said = [torch.tensor([3 + ord(c) % 80 for c in t], dtype=torch.int32)[: len(t) if tokens else 0] for t in TEXTS]
    return PixelRows(seen, said, [0, 1, 2, 0], {})


def batch_of(model, data: PixelRows, which=range(4), **kwargs) -> tuple[PixelObjective, dict]:
    objective = PixelObjective(model, None, 0, **kwargs)
    full = PaddedDataset(data, 8)
    return objective, objective.collate([full[i] for i in which])


# ---- pixels ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(8, 40), (16, 24), (24, 8)])
def test_patches_go_back_to_the_image(shape: tuple[int, int]) -> None:
    image = torch.rand(*shape, 3)
    assert torch.equal(unpatchify(patchify(image, P), P, shape[1]), image)


def test_the_convolution_reads_pixels_in_the_order_of_patches(model: PixelLlamaForCausalLM) -> None:
    """A convolution whose weights pick one pixel each gives the patch itself."""
    conv = torch.nn.Conv2d(3, 3 * P * P, P, P, bias=False)
    image = torch.rand(P, 4 * P, 3)
    with torch.no_grad():
        conv.weight.copy_(torch.eye(3 * P * P).view(-1, P, P, 3).permute(0, 3, 1, 2))
        found = conv(image.permute(2, 0, 1)[None])[0, :, 0].T
    assert torch.equal(found, patchify(image, P))
    embed, patches = model.patch_embed, patchify(image, P)[None]
    with torch.no_grad():
        whole = embed.norm(embed.projection(image.permute(2, 0, 1)[None])[0, :, 0].T)
        assert torch.allclose(embed(patches)[0], whole, atol=1e-5)


def test_rendering_is_what_it_was(renderer: Renderer) -> None:
    """The pixels of a font and size are pinned: other ones would be another input to every trained model."""
    assert renderer.path == default_font() and renderer.hash == Renderer(size=7, patch=P).hash
    once, _ = renderer("A text, twice.")
    assert np.array_equal(once, Renderer(size=7, patch=P)("A text,  twice. ")[0])
    assert not np.array_equal(once, Renderer(size=6, patch=P)("A text, twice.")[0])


def test_one_black_patch_ends_a_text_and_one_parts_two(renderer: Renderer) -> None:
    one, cut = renderer("apple")
    black = (one == 0).all(1)
    assert black.tolist() == [False] * (len(one) - 1) + [True] and not cut
    two, _ = renderer("apple", "boat")
    assert (two == 0).all(1).sum() == 2 and np.array_equal(two[: len(one)], one)
    short, cut = renderer("a long text that does not fit in here", most=5)
    assert cut and len(short) == 5 and (short[-1] == 0).all()
    assert len(renderer("")[0]) == 2


def test_a_font_without_the_script_is_refused_and_single_characters_are_counted(renderer: Renderer) -> None:
    assert renderer.lacking("abc é я") == 0 and renderer.lacking("漢字") == 2
    assert check_script(renderer, ["a long text of letters with one 漢"]) == 1
    with pytest.raises(UserError, match="does not have the script"):
        check_script(renderer, ["漢字かな"])
    with pytest.raises(UserError, match="is no font"):
        Renderer(__file__)


def test_normalised_targets_make_black_white_and_mended_ones_do_not() -> None:
    black, white, text = torch.zeros(1, 12), torch.ones(1, 12), torch.rand(1, 12)
    assert torch.equal(targets(black, "normalised"), targets(white, "normalised"))
    assert torch.equal(targets(black, "mended"), -torch.ones(1, 12)) and torch.equal(targets(white, "mended"), torch.ones(1, 12))
    found = targets(text, "mended")
    assert torch.equal(found, targets(text, "normalised")) and float(found.mean()) == pytest.approx(0, abs=1e-6)
    assert float(found.var()) == pytest.approx(1, abs=1e-3) and torch.equal(targets(text, "plain"), text)


# ---- the model ---------------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_text_alone_is_llama_bit_for_bit_and_by_the_joint_way(model: PixelLlamaForCausalLM) -> None:
    llama, ids = model_of("llama").eval(), torch.tensor([[3, 4, 5, 6, 7]])
    assert torch.equal(model(input_ids=ids).logits, llama(input_ids=ids).logits)
    assert torch.allclose(model(input_ids=ids, joint=True).logits, llama(input_ids=ids).logits, atol=1e-5)


@torch.no_grad()
def test_tail_pixels_and_padding_never_matter(model: PixelLlamaForCausalLM, renderer: Renderer) -> None:
    objective, batch = batch_of(model, rows(renderer, tokens=True))
    before = objective.forward(model, batch, batch["weights"][:, 1:])
    other = {k: v.clone() for k, v in batch.items()}
    other["patches"][~batch["patch_mask"]] = 77
    other["input_ids"][~batch["mask"]] = 9
    after = objective.forward(model, other, batch["weights"][:, 1:])
    assert torch.equal(before.losses, after.losses) and torch.equal(before.tokens, after.tokens)
    for i in range(4):
        objective, alone = batch_of(model, rows(renderer, tokens=True), [i])
        one = objective.forward(model, alone, alone["weights"][:, 1:])
        assert float(one.losses.sum()) == pytest.approx(float(before.losses[i].sum()), rel=1e-4)


@torch.no_grad()
def test_a_patch_changes_nothing_before_it(model: PixelLlamaForCausalLM) -> None:
    patches = torch.rand(1, 6, 3 * P * P)
    other = patches.clone()
    other[0, 4] = 0
    a, b = model(patches=patches).pixels, model(patches=other).pixels
    assert torch.allclose(a[:, :4], b[:, :4], atol=1e-6) and not torch.allclose(a[:, 4:], b[:, 4:], atol=1e-3)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.allclose(model(patches=patches, input_ids=ids).pixels, a, atol=1e-5), "tokens come after patches"


@torch.no_grad()
def test_the_loss_is_that_of_its_definition(model: PixelLlamaForCausalLM, renderer: Renderer) -> None:
    objective, batch = batch_of(model, rows(renderer, tokens=True), [1], how="normalised", apart=True)
    out = objective.forward(model, batch, batch["weights"][:, 1:])
    patches, ids = batch["patches"].float() / 255, batch["input_ids"]
    seen = model(patches=patches, input_ids=ids)
    mean, std = patches[0, 1:].mean(-1, keepdim=True), (patches[0, 1:].var(-1, keepdim=True) + 1e-6).sqrt()
    pixel = ((seen.pixels[0, :-1] - (patches[0, 1:] - mean) / std) ** 2).mean(-1)
    assert torch.allclose(out.losses[0, : len(pixel)], pixel, atol=1e-5)
    assert float(out.total) == pytest.approx(float(pixel.sum()), rel=1e-5)
    token = F.cross_entropy(seen.logits[0, :-1], ids[0, 1:], reduction="sum")
    assert float(out.tokens[0]) == pytest.approx(float(token), rel=1e-5)
    assert int(TokenTerm().count(batch)) == ids.shape[1] - 1
    assert (batch["labels"][0] != IGNORE).tolist() == [False] + [True] * len(pixel) + [False] + [True] * (ids.shape[1] - 1)


@torch.no_grad()
def test_classes_are_read_at_the_last_real_place(model: PixelLlamaForCausalLM, renderer: Renderer) -> None:
    objective, batch = batch_of(model, rows(renderer, tokens=True), classify=True)
    found = model(**objective.inputs(batch)).classes
    for i in range(4):
        _, alone = batch_of(model, rows(renderer, tokens=True), [i], classify=True)
        assert torch.allclose(model(**objective.inputs(alone)).classes[0], found[i], atol=1e-4)
    right = objective.further(batch, objective.forward(model, batch, torch.ones(4, 1)))["accuracy"]
    assert right == (float((found.argmax(1) == torch.tensor([0, 1, 2, 0])).sum()), 4.0)


@torch.no_grad()
def test_generation_ends_at_a_black_patch(model: PixelLlamaForCausalLM) -> None:
    class Black(torch.nn.Module):
        config = model.config

        def forward(self, patches):
            return type("O", (), {"pixels": -torch.ones_like(patches)})()

    start = torch.rand(2, 3 * P * P)
    found, ended = generate(Black(), start)
    assert ended and len(found) == 3 and not found[-1].any() and torch.equal(found[:2], start)
    drawn, _ = generate(model, start, most=3)
    assert image_of(drawn, P).size == (len(drawn) * P, P)


def test_roles_of_all_parameters_are_known(model: PixelLlamaForCausalLM) -> None:
    roles = {p.role for p in Anatomy(model)}
    assert {"embed.patch", "norm.patch", "head.pixel", "head.score", "head", "attn.q"} <= roles


# ---- training ----------------------------------------------------------------------------------------------------------
def trained(model, data: PixelRows, folder: Path, apart: bool = False, techniques=None, **train):
    torch.manual_seed(0)
    settings = Train(**{"batch": 4, "lr": 1e-2, "epochs": 1, "warmup": 0.0, "record": False, **train})

    class Apart(Technique):
        name = "apart"

        def terms(self):
            return [TokenTerm()] if apart else []

    objective = PixelObjective(model, None, 0, apart=apart)
    return fit(model, data, settings, techniques=techniques or [Apart()], evals={"e": data}, folder=folder, seed=0, objective=objective)


def test_accumulated_steps_are_whole_ones(renderer: Renderer, tmp_path: Path) -> None:
    found = []
    for k, sizes in enumerate(({"batch": 4}, {"batch": 1, "accumulate": 4})):
        torch.manual_seed(0)
        own = PixelLlamaForCausalLM.from_llama(model_of("llama"), patch_size=P)
        trained(own, rows(renderer, tokens=True), tmp_path / str(k), apart=True, optimizer="sgd", clip=0.0, **sizes)
        found.append(torch.cat([p.detach().flatten() for p in own.parameters()]))
    assert torch.allclose(*found, atol=1e-5)


def test_half_fine_tuning_runs_on_patches(renderer: Renderer, tmp_path: Path) -> None:
    from modelwright.tune.hft import METHOD as Hft
    from modelwright.tune.hft import Knobs as HftKnobs

    own = PixelLlamaForCausalLM.from_llama(model_of("llama"), patch_size=P)
    before = {n: p.detach().clone() for n, p in own.named_parameters()}
    out = trained(own, rows(renderer), tmp_path, techniques=[Hft(HftKnobs())], epochs=2)
    still = sum(torch.equal(p, before[n]) for n, p in own.named_parameters())
    assert still > 5 and out.at("e")["loss"] < out.at("e", last=False)["loss"]


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lines")
    words = ("apple", "boat", "cloud", "drum")
    (folder / "t.jsonl").write_text(
        "".join(json.dumps({"text": f"a {w} {i}", "label": ("even", "odd")[i % 2]}) + "\n" for i, w in enumerate(words * 5))
    )
    return folder / "t.jsonl"


QUICK = {"patch": P, "font_size": 7, "patches": 24, "train": {"batch": 4, "epochs": 1, "lr": 3e-3, "record": False}}


@pytest.fixture(scope="module")
def base(lines: Path, tmp_path_factory) -> Path:
    """A pixel model out of the seedling."""
    to = tmp_path_factory.mktemp("base") / "out"
    modelwright.run("modalities.pixels", base="seedling", to=to, data={"path": str(lines), "column": "text"}, regime="pair", **QUICK)
    return to


def test_a_run_gives_a_checkpoint_that_goes_on_and_sorts(base: Path, lines: Path, tmp_path: Path) -> None:
    source = Checkpoint(base)
    assert source.hf_config.font_hash == Renderer(size=7).hash and source.hf_config.pixel_targets == "mended"
    result = modelwright.run("modalities.pixels", base=base, to=tmp_path / "out", data={"path": str(lines)}, task="classify", **QUICK)
    evals = result.steps[-1]["evals"]
    assert all(0 <= e["accuracy"] <= 1 for e in evals) and Checkpoint(tmp_path / "out").hf_config.num_classes == 2
    assert type(Checkpoint(tmp_path / "out").model(torch.float32)).__name__ == "PixelLlamaForCausalLM"


@pytest.mark.slow
@pytest.mark.parametrize("regime", ["text", "mono"])
def test_each_regime_trains(base: Path, lines: Path, tmp_path: Path, regime: str) -> None:
    data = {"path": str(lines), "column": "text"}
    result = modelwright.run("modalities.pixels", base=base, to=tmp_path / "out", data=data, regime=regime, holdout=0.3, **QUICK)
    told = result.steps[-1]["evals"][-1]
    assert ("pixel_loss" in told) == (regime == "mono") and told["token_loss"] > 0


def test_a_pixel_model_grows_like_any_other(base: Path, tmp_path: Path) -> None:
    result = modelwright.run("reshape.grow", base=base, to=tmp_path / "out", operator="zero", depth=2)
    assert result.certificate["passed"] and result.certificate["loads_in"] == "PixelLlamaForCausalLM"
    a, b = (Checkpoint(p).model(torch.float32).eval() for p in (base, tmp_path / "out"))
    patches = torch.rand(1, 5, 3 * P * P)
    with torch.no_grad():
        assert torch.allclose(a(patches=patches).pixels, b(patches=patches).pixels, atol=1e-5)


def test_keys_and_values_of_a_pixel_model_are_evicted_like_any_other(base: Path, tmp_path: Path) -> None:
    result = modelwright.run("cache.generate", base=base, to=tmp_path / "out", prompt="one two three four " * 8, keep=0.5, max_new_tokens=4)
    assert result.steps[-1]["text"]


@pytest.mark.slow
def test_bad_input_is_one_sentence(base: Path, lines: Path, tmp_path: Path) -> None:
    def run(of, **knobs):
        modelwright.run(
            "modalities.pixels", base=of, to=tmp_path / "out", **({"data": {"path": str(lines), "column": "text"}} | QUICK | knobs)
        )

    with pytest.raises(UserError, match="was trained on patches of 8 pixels"):
        run(base, font_size=6)
    (tmp_path / "one.jsonl").write_text('{"text": "a", "label": "x"}\n' * 4)
    with pytest.raises(UserError, match="has one value"):
        run(base, data={"path": str(tmp_path / "one.jsonl")}, task="classify")
    (tmp_path / "kanji.jsonl").write_text('{"text": "漢字かな"}\n' * 4)
    with pytest.raises(UserError, match="does not have the script"):
        run(base, data={"path": str(tmp_path / "kanji.jsonl")})
    model_of("qwen2").save_pretrained(tmp_path / "qwen")
    with pytest.raises(UserError, match="the base is a qwen2"):
        run(tmp_path / "qwen")
    assert not (tmp_path / "out").exists() and Pixels(Knobs(**{k: v for k, v in QUICK.items() if k != "train"})).classes == []
