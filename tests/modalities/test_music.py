"""Music: the algebra of v-diffusion, a sampler that is exact where the answer is known, and clips of every kind."""

import json
import math
import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import modelwright
from modelwright.core.data.rows import PaddedDataset
from modelwright.core.errors import UserError
from modelwright.core.knobs import Train
from modelwright.core.train.loop import fit
from modelwright.modalities.music import sample
from modelwright.modalities.sound import diffusion as d
from modelwright.modalities.sound import waves as w
from modelwright.models.music import WaveUNet, WaveUNetConfig
from modelwright.testing import made


def unet(**more) -> WaveUNet:
    torch.manual_seed(0)
    return WaveUNet(WaveUNetConfig(**({"widths": [8, 16], "stem": 4, "layers": 1, "heads": 2, "text_width": 12, "length": 96} | more)))


@pytest.fixture(scope="module")
def model() -> WaveUNet:
    """With an output layer that is not zero."""
    torch.set_num_threads(1)
    found = unet()
    torch.nn.init.normal_(found.net.out.weight, std=0.2)
    torch.nn.init.normal_(found.net.null, std=0.5)
    return found.eval()


def told(n: int = 2, width: int = 12) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return d.together([torch.randn(2 + i, width, generator=g) for i in range(n)])


# ---- algebra -----------------------------------------------------------------------------------------------------------
def test_wave_noise_and_v_are_three_views_of_one_thing() -> None:
    x, eps, t = torch.randn(7, 33), torch.randn(7, 33), torch.tensor([0.0, 0.1, 0.3, 0.5, 0.7, 0.99, 1.0])
    z, v = d.noisy(x, eps, t)
    back = d.clean(z, v, t)
    assert torch.allclose(back[0], x, atol=1e-6) and torch.allclose(back[1], eps, atol=1e-6)
    a, s = d.schedule(t)
    assert torch.allclose(a**2 + s**2, torch.ones(7, 1), atol=1e-6)
    inner = slice(1, 6)
    assert torch.allclose(d.as_v(eps, z, t, "eps")[inner], v[inner], atol=1e-4)
    assert torch.allclose(d.as_v(x, z, t, "x")[inner], v[inner], atol=1e-4)
    assert torch.equal(d.as_v(v, z, t, "v"), v)


def oracle(mean: torch.Tensor, spread: torch.Tensor) -> d.Predict:
    """The best v for waves that are independent Gaussians: x given z is Gaussian too."""

    def predict(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a, s = d.schedule(t.double())
        x = mean + a * spread**2 / (a**2 * spread**2 + s**2) * (z - a * mean)
        return (a * z - x) / s

    return predict


def test_the_sampler_maps_noise_to_the_data_where_v_is_known() -> None:
    mean, spread = torch.tensor([1.0, -2.0, 0.0]).double(), torch.tensor([0.5, 1.0, 2.0]).double()
    z = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)).double()
    gaps = []
    for steps in (10, 40, 160):
        x = d.ddim(oracle(mean, spread), z, steps)
        exact = mean + spread * z  # the flow of a Gaussian is linear, and keeps the order of its values
        gaps.append(float((x - exact).abs().max()))
    assert gaps[0] > 2.5 * gaps[1] > 6 * gaps[2] and gaps[2] < 0.1
    assert torch.allclose(x.mean(0), mean, atol=0.1) and torch.allclose(x.std(0), spread, rtol=0.05)


def test_a_scheduler_of_another_library_gives_the_same_where_it_takes_the_same_steps() -> None:
    class Ddim:
        """The interface of diffusers, with our own step."""

        def set_timesteps(self, n: int) -> None:
            self.timesteps = torch.arange(999, -1, -(1000 // n))
            self.alphas_cumprod = torch.cos(math.pi / 2 * (torch.arange(1000) + 1) / 1000) ** 2
            self.gap = 1000 // n

        def step(self, v, i, z):
            now, after = ((torch.tensor([max(0, int(k) + 1) / 1000])) for k in (i, i - self.gap))
            x, eps = d.clean(z, v, now)
            a, s = d.schedule(after)
            return SimpleNamespace(prev_sample=a * x + s * eps)

    z = torch.randn(5, 3).double()
    predict = oracle(torch.zeros(3).double(), torch.full((3,), 0.7).double())
    assert torch.allclose(d.by_scheduler(predict, z, 20, Ddim()), d.ddim(predict, z, 20), atol=1e-3)
    with pytest.raises(UserError, match="diffusers is not installed|no scheduler of diffusers"):
        d.scheduler_named("NoScheduler")


@torch.no_grad()
def test_guidance_of_one_is_the_conditional_call_and_of_zero_the_other(model: WaveUNet) -> None:
    z, t, given = torch.randn(2, 96), torch.tensor([0.4, 0.8]), told()
    conditional, free = model(z, t, **given), model(z, t)
    assert torch.equal(d.guided(model, given, 1.0)(z, t), conditional)
    assert torch.equal(d.guided(model, given, 0.0)(z, t), free) and not torch.allclose(conditional, free, atol=1e-4)
    assert torch.allclose(d.guided(model, given, 3.0)(z, t), free + 3 * (conditional - free), atol=1e-4)


# ---- the network -------------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_a_fresh_network_predicts_nothing_so_its_loss_is_the_square_of_v() -> None:
    fresh = unet()
    objective = d.Diffusion(fresh, 0)
    rows = d.WaveRows(torch.randn(4, 96) * 1.0, [0, 1, 0, 1], [torch.randn(2, 12), torch.randn(3, 12)], {})
    batch = objective.collate([rows[i] for i in range(4)])
    _, v = d.noisy(batch["x"], batch["eps"], batch["time"])
    losses = objective.forward(fresh, batch, torch.ones(4, 1)).losses
    assert torch.allclose(losses[:, 0], (v**2).mean(1), atol=1e-6) and float(losses.mean()) == pytest.approx(1, abs=0.25)


@torch.no_grad()
@pytest.mark.parametrize("length", [96, 97, 111, 64, 200])
def test_any_length_comes_back(model: WaveUNet, length: int) -> None:
    assert model(torch.randn(2, length), torch.rand(2), **told()).shape == (2, length)


@torch.no_grad()
@pytest.mark.parametrize("stem", [1, 2, 8])
def test_any_stem(stem: int) -> None:
    assert unet(stem=stem)(torch.randn(1, 80), torch.rand(1)).shape == (1, 80)


@torch.no_grad()
def test_padded_text_changes_nothing_and_rows_are_apart(model: WaveUNet) -> None:
    z, t, given = torch.randn(2, 96), torch.rand(2), told()
    before = model(z, t, **given)
    other = {k: v.clone() for k, v in given.items()}
    other["text"][~given["mask"]] = 99.0
    assert torch.equal(model(z, t, **other), before)
    alone = {k: v[:1, :2] for k, v in given.items()}
    assert torch.allclose(model(z[:1], t[:1], **alone), before[:1], atol=1e-5)


@torch.no_grad()
def test_bf16_is_near_fp32(model: WaveUNet) -> None:
    z, t, given = torch.randn(2, 96), torch.rand(2), told()
    half = unet().to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    near = half(z.bfloat16(), t, given["text"].bfloat16(), given["mask"]).float()
    whole = model(z, t, **given)
    assert float((near - whole).norm() / whole.norm()) < 0.05


def test_the_same_noise_whatever_the_batch_and_empty_rows_count_nothing() -> None:
    fresh = unet()
    objective = d.Diffusion(fresh, 3)
    rows = d.WaveRows(torch.randn(3, 96), [0, 1, 0], [torch.randn(2, 12), torch.randn(4, 12)], {})
    full = PaddedDataset(rows, 4)
    whole, alone = objective.collate([full[i] for i in range(4)]), objective.collate([rows[1]])
    objective.prepare(whole, 9)
    objective.prepare(alone, 9)
    assert torch.equal(whole["eps"][1], alone["eps"][0]) and float(whole["time"][1]) == float(alone["time"][0])
    assert not torch.equal(whole["eps"][0], whole["eps"][1])
    assert float(objective.forward(fresh, whole, torch.ones(4, 1)).losses[3]) == 0.0
    assert int((whole["labels"][:, 1] == 0).sum()) == 3


def test_texts_are_dropped_as_often_as_asked() -> None:
    objective = d.Diffusion(unet(), 0, drop=0.3)
    rows = d.WaveRows(torch.randn(1, 8), [0], [torch.randn(2, 12)], {})
    batch = objective.collate([rows[0]])
    gone = 0
    for step in range(400):
        objective.prepare(batch, step)
        gone += not bool(batch["mask"].any())
    assert 80 < gone < 160


def test_the_average_of_the_weights_is_what_is_kept(tmp_path: Path) -> None:
    average = d.Average(0.5)
    p = torch.nn.Parameter(torch.zeros(2))
    for value in (1.0, 2.0, 4.0):
        p.data.fill_(value)
        average.after_step([("w", p)])
    expected, count = 1.0, 1
    for value in (2.0, 4.0):
        count += 1
        keep = min(0.5, (1 + count) / (10 + count))
        expected = keep * expected + (1 - keep) * value
    assert torch.allclose(average.mean["w"], torch.full((2,), expected))
    other = d.Average(0.5)
    other.load_state_dict(average.state_dict())
    assert other.count == 3 and torch.equal(other.mean["w"], average.mean["w"])


def test_accumulated_steps_are_whole_ones(tmp_path: Path) -> None:
    rows = d.WaveRows(
        torch.randn(8, 96, generator=torch.Generator().manual_seed(0)), [0, 1] * 4, [torch.ones(2, 12), torch.zeros(1, 12)], {}
    )
    found = []
    for k, sizes in enumerate(({"batch": 4}, {"batch": 2, "accumulate": 2})):
        fresh = unet()
        train = Train(**sizes, epochs=1, lr=0.05, optimizer="sgd", clip=0.0, warmup=0.0, record=False)
        fit(fresh, rows, train, techniques=[d.Average()], evals={}, folder=tmp_path / str(k), seed=0, objective=d.Diffusion(fresh, 0))
        found.append(torch.cat([p.detach().flatten() for p in fresh.parameters()]))
    assert torch.allclose(*found, atol=1e-5)


def test_a_stopped_run_goes_on_to_the_same_average(tmp_path: Path) -> None:
    waves = torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
    rows = d.WaveRows(waves, [0, 1] * 4, [torch.ones(2, 12), torch.zeros(1, 12)], {})
    train = Train(batch=4, epochs=2, lr=1e-2, warmup=0.0, save_every=2, record=False)

    def go(folder: Path, stop: int | None = None) -> d.Average:
        average, fresh = d.Average(0.9), unet()

        def tick(step: int, of: int) -> None:
            if step == stop:
                raise InterruptedError

        fit(fresh, rows, train, techniques=[average], evals={}, folder=folder, seed=0, tick=tick, objective=d.Diffusion(fresh, 0))
        return average

    whole = go(tmp_path / "a")
    with pytest.raises(InterruptedError):
        go(tmp_path / "b", stop=3)
    again = go(tmp_path / "b")
    assert again.count == whole.count == 4 and all(torch.equal(again.mean[n], m) for n, m in whole.mean.items())


# ---- files -------------------------------------------------------------------------------------------------------------
def write_wav(file: Path, x: np.ndarray, rate: int = 8000, channels: int = 1, width: int = 2) -> None:
    with wave.open(str(file), "wb") as f:
        f.setnchannels(channels)
        f.setsampwidth(width)
        f.setframerate(rate)
        scaled = np.round(np.repeat(x, channels) * (2 ** (8 * width - 1) - 1)).astype(np.int64)
        if width == 1:
            f.writeframes((scaled + 128).astype(np.uint8).tobytes())
        else:
            f.writeframes(b"".join(int(v).to_bytes(width, "little", signed=True) for v in scaled))


def test_every_width_of_samples_is_read(tmp_path: Path) -> None:
    x = 0.5 * np.sin(np.arange(200) / 5)
    for width in (1, 2, 3, 4):
        write_wav(tmp_path / "a.wav", x, width=width, channels=2)
        found, rate, channels = w.read_wave(tmp_path / "a.wav")
        assert np.allclose(found, x, atol=0.02 if width == 1 else 1e-3) and (rate, channels) == (8000, 2)


def test_other_rates_stereo_and_short_clips_are_counted(tmp_path: Path) -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000) * 0.3
    write_wav(tmp_path / "a.wav", tone[:1000])
    write_wav(tmp_path / "b.wav", tone[:2000], rate=16000, channels=2)
    write_wav(tmp_path / "c.wav", tone[:40])
    write_wav(tmp_path / "d.wav", 0 * tone[:1000])
    write_wav(tmp_path / "e.wav", tone[:400])
    rows = [{"audio": f"{n}.wav", "text": n} for n in "abcde"]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    clips, prompts, facts, rate = w.read_clips(str(tmp_path / "t.jsonl"), "audio", "text", 0, 512)
    assert prompts == ["a", "b", "e"] and clips.shape == (3, 512) and rate == 8000
    assert np.allclose((clips**2).mean(1), 1, atol=1e-5)
    assert facts == {"clips": 3, "resampled to 8000 Hz": 1, "mixed down from stereo": 1, "cropped": 2, "padded with silence": 1,
                     "left out: shorter than an eighth of the length": 1, "left out: silent": 1}  # fmt: skip


def test_nothing_is_clipped_in_a_file(tmp_path: Path) -> None:
    spike = np.zeros(400, np.float32)
    spike[100] = 50
    for x, quieter in ((spike, True), (np.sin(np.arange(400) / 3), False)):
        data, quiet = w.wav_bytes(x, 8000)
        (tmp_path / "o.wav").write_bytes(data)
        found = w.read_wave(tmp_path / "o.wav")[0]
        assert quiet == quieter and np.corrcoef(found, x)[0, 1] > 0.999 and abs(found).max() < 1


def test_diversity_is_among_clips_of_one_prompt() -> None:
    x = np.random.default_rng(0).normal(size=(4, 1024))
    assert w.diversity(np.repeat(x[:1], 4, 0), ["a"] * 4) == 0 and w.diversity(x, ["a"] * 4) > 0.1
    assert w.diversity(x, ["a", "b", "c", "d"]) == 0


# ---- the command -------------------------------------------------------------------------------------------------------
TINY = {"length": 512, "widths": [8, 16], "stem": 4, "layers": 1, "each": 2, "steps": 3}


def test_a_run_writes_clips_a_player_and_a_model_that_says_the_same_again(tmp_path: Path) -> None:
    data = made("tones", tmp_path)
    result = modelwright.run("modalities.music", to=tmp_path / "out", **data, **TINY, train={"epochs": 2, "batch": 8, "record": False})
    metrics = result.plain()["metrics"]
    assert metrics["clips"] == 8 and set(metrics["diversity"]) == {"1", "3"}
    files = sorted((result.to / "clips").glob("*.wav"))
    assert len(files) == 8 and len(w.read_wave(files[0])[0]) == 512
    page = (result.to / "player.html").read_text()
    assert page.count("<audio") == 8 and "a high tone (guidance 3)" in page
    from transformers import AutoModel

    again = AutoModel.from_pretrained(result.to / "model").eval()
    words = sorted({"a", "high", "low", "tone"})
    prompts = [torch.tensor([words.index(x) for x in f"a {p} tone".split()]) for p in ("low", "low", "high", "high")]
    x = sample(again, prompts, length=512, guidance=1.0, steps=3, seed=0)
    assert w.wav_bytes(x[0].numpy(), 8000)[0] == files[0].read_bytes()


def test_the_states_of_a_base_steer(tmp_path: Path) -> None:
    data = made("tones", tmp_path)
    more = {"prompts": ["a tone that is very high"], "guidance": [2.0], "prediction": "eps"}
    result = modelwright.run(
        "modalities.music", base="seedling", to=tmp_path / "out", **data, **TINY, **more, train={"epochs": 1, "batch": 8}
    )
    assert result.plain()["metrics"]["clips"] == 2


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    data = made("tones", tmp_path)

    def run(**knobs) -> None:
        modelwright.run("modalities.music", to=tmp_path / "out", **(data | TINY | knobs))

    for knobs, what in (
        ({"prompts": ["an unheard tone"]}, "'an' is in no prompt"),
        ({"length": 20_000}, "has 0 usable clips"),
        ({"length": 64, "widths": [8, 8, 8, 8]}, "is too short for 4 levels"),
        ({"widths": [4]}, "do not fit"),
        ({"stem": 3}, "is odd"),
        ({"audio": "sound"}, "no column 'sound'"),
        ({"sampler": "Nothing"}, "diffusers"),
    ):
        with pytest.raises(UserError, match=what):
            run(**knobs)
    (tmp_path / "0.wav").write_text("not a wave")
    with pytest.raises(UserError, match="is no PCM wave file"):
        run()
    (tmp_path / "0.wav").unlink()
    with pytest.raises(UserError, match="no file at"):
        run()
    assert not (tmp_path / "out").exists()
