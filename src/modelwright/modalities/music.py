"""Sound from text: v-diffusion on raw samples with a 1-D U-Net, any text encoder, guidance.

When to use it: to see whether a text encoder that you reshaped still steers something, and to learn or teach diffusion on small clips.
It is no rival of large music models.

Paper: ERNIE-Music: Text-to-Waveform Music Generation with Diffusion Models (arXiv 2302.04456). No official code, weights or data are
public; what follows the abstract is standard algebra, and the architecture a reconstruction.

    z_t = alpha_t x + sigma_t eps,   alpha_t = cos(pi t / 2), sigma_t = sin(pi t / 2)
    v   = alpha_t eps - sigma_t x,   L = E |v_theta(z_t, t, y) - v|^2,   t ~ U(0, 1)
    sample: x = alpha z - sigma v, eps = sigma z + alpha v, z <- alpha' x + sigma' eps        DDIM, from t = 1 to 0
    guidance: v = v_u + w (v_c - v_u)                                                          w = 1 is the conditional model

The text's states go into the deepest blocks as further keys and values, their mean into every block. The base is any encoder or decoder,
frozen; its states are computed once. Without a base the words of the prompts have embeddings of their own, which fits tags.

Ours: guidance (the text is dropped in 15 % of the rows), an exponential average of the weights, which is what is saved and sampled from;
each clip is brought to mean square 1 first: raw samples are so quiet that the schedule would be almost pure noise; nothing is clipped,
a clip that would is made quieter and counted; any length. A scheduler of diffusers can take the sampler's place.

Results: one wav a prompt and guidance, player.html, which plays them, the model, and how diverse the clips of a prompt are.
"""

from dataclasses import dataclass
from typing import Any, Literal

from modelwright.core.errors import UserError
from modelwright.core.knobs import Train, knob
from modelwright.core.step import EvalResult, StepContext


@dataclass(frozen=True)
class Knobs:
    clips: str = knob(help="table with a column of wav files (relative to it) and one of texts", path=True, argument=True)
    audio: str = knob("audio", "column of the files")
    text: str = knob("text", "column of the prompts")
    rate: int = knob(0, "samples per second; 0: that of the first file, others are resampled", low=0)
    length: int = knob(4096, "samples of a clip; longer ones are cropped, shorter ones padded with silence", low=64)
    prompts: list[str] = knob([], "what to generate; empty: the ten commonest prompts of the data")
    each: int = knob(4, "clips of each prompt", low=1)
    guidance: list[float] = knob([1.0, 3.0], "weights of guidance to generate with")
    steps: int = knob(25, "steps of the sampler", low=1)
    sampler: str = knob("ddim", "ddim, or the name of a scheduler of diffusers")
    prediction: Literal["v", "eps", "x"] = knob("v", "what the network predicts")
    widths: list[int] = knob([64, 96, 128], "channels of the levels")
    stem: int = knob(8, "stride of the first convolution; 1 is the paper's and eight times dearer", low=1)
    layers: int = knob(2, "transformer blocks at the deepest level", low=1)
    drop: float = knob(0.15, "share of the rows that learn without their text", low=0, high=1)
    average: float = knob(0.995, "decay of the average of the weights", low=0, high=1)
    train: Train = knob(Train(epochs=40, lr=1e-3, batch=16, schedule="cosine"), "how long and how fast")


def music(knobs: Knobs, job: StepContext) -> EvalResult:
    """Train, save, generate, measure."""
    import shutil

    import torch

    from modelwright.core.train.loop import fit
    from modelwright.modalities.sound.diffusion import Average, Diffusion, WaveRows, scheduler_named
    from modelwright.modalities.sound.waves import diversity, read_clips

    if knobs.sampler != "ddim":
        scheduler_named(knobs.sampler)
    _check(knobs)
    waves, prompts, facts, rate = read_clips(knobs.clips, knobs.audio, knobs.text, knobs.rate, knobs.length)
    distinct = list(dict.fromkeys(prompts))
    wanted = list(dict.fromkeys(knobs.prompts)) or sorted(distinct, key=lambda p: -prompts.count(p))[:10]
    told, width, words = _told(job.source, distinct)
    also, _, _ = _told(job.source, wanted, words)
    model = _fresh(knobs, width, len(words), rate, job.seed)
    rows = WaveRows(torch.from_numpy(waves), [distinct.index(p) for p in prompts], told, facts)
    average, folder = Average(knobs.average), job.folder / "training"
    with job.progress.task("learn the clips", 1) as tick:
        out = fit(model, rows, knobs.train, techniques=[average], evals={}, folder=folder, seed=job.seed, tick=tick.to,
                  objective=Diffusion(model, job.seed, knobs.drop))  # fmt: skip
    model = average.export(out.model, folder).eval()
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(job.folder / "model")
    facts |= {
        "diversity of real clips": diversity(waves, prompts),
        "rate": rate,
        "weights": sum(p.numel() for p in model.parameters()),
        "steps": out.steps,
    }
    facts["loss at the end"] = out.log[-1]["loss"] if out.log else None
    return _generate(knobs, job, model, dict(zip(wanted, also, strict=True)), facts)


def _check(knobs: Knobs) -> None:
    if not knobs.widths or min(knobs.widths) < 8 or knobs.widths[-1] % 4:
        raise UserError(
            f"widths={knobs.widths} do not fit", "each is 8 or more and the last a multiple of 4", "write widths: [64, 96, 128]"
        )
    multiple = knobs.stem * 4 ** (len(knobs.widths) - 1)
    if knobs.length < 2 * multiple:
        what = f"length={knobs.length} is too short for {len(knobs.widths)} levels"
        raise UserError(what, f"the deepest one sees every {multiple}th sample", "give longer clips, fewer widths or a smaller stem")
    if knobs.stem % 2 and knobs.stem > 1:
        raise UserError(f"stem={knobs.stem} is odd", "its kernel is centred for even strides and for 1", "write 1 or an even number")


def _fresh(knobs: Knobs, width: int, words: int, rate: int, seed: int) -> Any:
    import torch

    from modelwright.models.music import WaveUNet, WaveUNetConfig

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"widths": knobs.widths, "stem": knobs.stem, "layers": knobs.layers, "text_width": width, "words": words}
    return WaveUNet(WaveUNetConfig(**sizes, prediction=knobs.prediction, rate=rate, length=knobs.length))


def _told(source: Any, prompts: list[str], words: dict[str, int] | None = None) -> tuple[list[Any], int, dict[str, int]]:
    """Each prompt as the states of the base (n, D), or as ids of its words; their width and the words."""
    import re

    import torch

    if source is None:
        split = [re.findall(r"\w+", p.lower()) for p in prompts]
        known = words if words is not None else {w: i for i, w in enumerate(sorted({w for p in split for w in p}))}
        if new := next((w for p in split for w in p if w not in known), None):
            raise UserError(
                f"'{new}' is in no prompt of the data", "without a base only known words can be said", "give a base, or other prompts"
            )
        if empty := next((p for p, s in zip(prompts, split, strict=True) if not s), None):
            raise UserError(f"the prompt {empty!r} has no word", how="give each clip a text")
        return [torch.tensor([known[w] for w in p]) for p in split], 64, known
    tokenizer, model = source.tokenizer(), source.model(torch.float32).eval()
    if tokenizer is None:
        raise UserError("the base has no tokenizer", "it reads the prompts", "add tokenizer files, or give no base")
    trunk = model.get_encoder() if model.config.is_encoder_decoder else model
    found = []
    with torch.no_grad():
        for p in prompts:
            ids = torch.tensor([tokenizer(p)["input_ids"]])
            if not ids.numel():
                raise UserError(f"the prompt {p!r} has no token", how="give each clip a text")
            states = trunk(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
            found.append(states / states.std().clamp(min=1e-6))
    return found, found[0].shape[1], {}


def sample(model: Any, told: list[Any], *, length: int, guidance: float, steps: int, seed: int, sampler: str = "ddim") -> Any:
    """Waves (n, length), one for each prompt."""
    import torch

    from modelwright.modalities.sound.diffusion import by_scheduler, ddim, guided, scheduler_named, together

    z = torch.randn(len(told), length, generator=torch.Generator().manual_seed(seed))
    predict = guided(model, together(told), guidance)
    return ddim(predict, z, steps) if sampler == "ddim" else by_scheduler(predict, z, steps, scheduler_named(sampler))


def _generate(knobs: Knobs, job: StepContext, model: Any, told: dict[str, Any], facts: dict[str, Any]) -> EvalResult:
    """Clips of each prompt at each guidance; `told` holds what the model is told for a prompt."""
    from modelwright.modalities.sound.waves import diversity, player, wav_bytes

    folder = job.folder / "clips"
    folder.mkdir(exist_ok=True)
    playing, scores, quieter, real = [], {}, 0, facts["diversity of real clips"]
    with job.progress.task("generate", len(knobs.guidance)) as tick:
        for w in knobs.guidance:
            names = [p for p in told for _ in range(knobs.each)]
            states = [told[p] for p in names]
            x = sample(model, states, length=knobs.length, guidance=w, steps=knobs.steps, seed=job.seed, sampler=knobs.sampler).numpy()
            scores[f"{w:g}"] = diversity(x, names)
            for i, (name, wave) in enumerate(zip(names, x, strict=True)):
                data, quiet = wav_bytes(wave, int(facts["rate"]))
                quieter += quiet
                (folder / f"guidance-{w:g}-{i // knobs.each:02d}-{i % knobs.each}.wav").write_bytes(data)
                playing.append((f"{name} (guidance {w:g})", data))
            tick(1)
    (job.folder / "player.html").write_text(player(playing, "Generated clips"), encoding="utf-8")
    facts["made quieter so that nothing is clipped"] = quieter
    facts["listen"] = "player.html"
    metrics = {"diversity": scores, "diversity_real": real, "loss": facts["loss at the end"], "clips": len(playing)}
    words = f"{len(playing)} clips of {len(told)} prompts. Diversity within a prompt (real clips {real:.3f}): " + ", ".join(
        f"{v:.3f} at guidance {w}" for w, v in scores.items()
    )
    rows = [[w, f"{v:.3f}"] for w, v in scores.items()] + [["real clips", f"{real:.3f}"]]
    table = {"title": "Standard deviation of log spectra within a prompt", "columns": ["guidance", "diversity"], "rows": rows}
    return EvalResult(metrics, words + ".", [(str(len(playing)), "clips", "player.html plays them")], [table], facts=facts)


METHOD = music
