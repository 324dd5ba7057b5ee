"""What would the loss of a test example be, step by step, had I trained on these examples in this order? And which examples do harm?

When to use it: you recorded some runs over the same data in other orders (tuning writes dynamics.parquet; set train.eval_every: 1 and
give each test example as one of `evals`), and want to choose or drop training examples without training again.

Paper: On Training Data Influence of GPT Models, GPTfluence (arXiv 2404.07840); official code ernie-research/gptfluence. Simfluence:
arXiv 2303.08114. TracIn: arXiv 2002.08484.

    phi_t(z') = sum_j alpha_j(c_t, z') phi_{t-j}(z') + beta(c_t, z')        c_t: the batch of step t
    alpha_j(c, z') = sum_{i in c} A_ij(z'),  beta(c, z') = sum_{i in c} B_i(z')
    tables       A, B are free numbers of each pair (Simfluence)
    gptfluence   A_ij = <f_j(h_i), f_j(h')>, B_i = <g(h_i), g(h')>; h: vectors of the texts
    tracin       phi_t = phi_{t-1} - lr mean_i <g_i, g'>                    gradients of the checkpoint
    kernel       phi_t - phi_{t-1} from phi, <g_i, g'> and the time (ours)

Beside them stand two controls without any example in them: constant, and the mean curve of the training runs. The paper lacks the second,
which is hard to beat. `between_runs` is the variance of the last losses over runs: where it is near 0, order does not matter.

The official code stops with an error for order 2 and above, multiplies token-summed gradients in TracIn, fits TracIn's scale on the runs it
is tested on, and rolls out one run, test and step at a time. Ours: all of it in one batched roll-out; examples add to alpha_1 = 1,
so that a smaller batch is not a smaller loss; exact gradient products by torch.func; `objective: roll_out` also trains through whole runs;
unlogged steps are joined to intervals.

influence.jsonl has a line for each example: by how much the mean last loss of the tests rises when the average example takes its place,
in the simulator that did best. With `examples` and `drop`, kept.jsonl is the data without the most harmful ones, as curate and tune take
it. Example i must be row i of the data: chats, pairs or texts, not packed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from modelwright.core.errors import UserError
from modelwright.core.knobs import knob
from modelwright.core.step import EvalResult, StepContext


@dataclass(frozen=True)
class Knobs:
    runs: list[str] = knob(help="recorded runs: dynamics.parquet files, or folders that hold them", path=True)
    test_runs: int = knob(2, "runs to measure on, the last ones; the others are learnt from", low=1)
    examples: str = knob("", "table that was trained on; row i is example i", path=True)
    tests: str = knob("", "table with the columns name and text of the tests", path=True)
    features: Literal["words", "states", "file"] = knob("words", "vectors of the texts: hashed words, last states of the base, or a file")
    vectors: str = knob("", "features: file: npz with examples (rows of the data, d) and tests (in the order of their names, d)", path=True)
    gradients: bool = knob(True, "also simulate from gradients, where there is a base")
    order: int = knob(1, "past losses that the next one depends on", low=1)
    objective: Literal["one_step", "roll_out"] = knob("one_step", "learn single steps (paper) or whole runs")
    epochs: int = knob(300, "passes over the recorded steps, at most", low=1)
    lr: float = knob(1e-3, "learning rate of the simulator", low=0)
    ridge: float = knob(1e-3, "penalty of the tables", low=0)
    drop: float = knob(0.1, "share of the examples that kept.jsonl leaves out, the most harmful ones", low=0, high=0.9)


def influence(knobs: Knobs, job: StepContext) -> EvalResult:
    """Fit every simulator that the input allows, measure them on the last runs, and rank the examples."""
    from modelwright.inspect.simulate import simulators as s
    from modelwright.inspect.simulate.runs import found_files, read_runs, tests_of, texts_of

    runs = read_runs(found_files(knobs.runs))
    if len(runs) < knobs.test_runs + 2:
        raise UserError(f"{len(runs)} runs are too few", f"{knobs.test_runs} are measured on and two are learnt from", "record more runs")
    train, test = runs.take(slice(0, -knobs.test_runs)), runs.take(slice(-knobs.test_runs, None))
    rows, texts = texts_of(knobs.examples, runs.examples) if knobs.examples else ([], [])
    wanted = tests_of(knobs.tests, runs.tests) if knobs.tests else []
    found = {"constant": s.constant(train, test), "mean curve": s.mean_curve(train, test)}
    a, b = s.tables(train, knobs.ridge)
    pairs = {"tables": (a[None], b)}
    found["tables"] = s.by_tables(a, b, test)
    if texts and wanted:
        h, to = _vectors(knobs, job, runs.examples, texts, wanted)
        with job.progress.task("learn to simulate", knobs.epochs) as tick:
            model = s.fit_gptfluence(train, h, to, order=knobs.order, objective=knobs.objective, epochs=knobs.epochs, lr=knobs.lr,
                                     seed=job.seed, tick=tick)  # fmt: skip
        found["gptfluence"] = s.by_gptfluence(model, h, to, test)
        own = model.tables(h, to)
        pairs["gptfluence"] = (own[0].detach().double().numpy(), own[1].detach().double().numpy())
        if knobs.gradients and job.source is not None:
            from modelwright.inspect.simulate.features import kernel

            k = kernel(job.source, texts, wanted).double().numpy()
            found |= {"tracin": s.tracin(train, test, k), "gradient kernel": s.gradient_kernel(train, test, k)}
    scores = {name: s.errors(f, test.phi) for name, f in found.items()}
    best = min(pairs, key=lambda name: scores[name]["mse"])
    effects = s.left_out_effects(*pairs[best], train).mean(1)
    facts = runs.facts | _written(knobs, job, runs, effects, rows) | {"influence by": best}
    return _result(runs, test, found, effects, facts)


def _vectors(knobs: Knobs, job: StepContext, examples: list[int], texts: list[str], wanted: list[str]) -> Any:
    from modelwright.inspect.simulate import features

    if knobs.features == "states":
        if job.source is None:
            raise UserError("features=states needs a base", "they are the states of a checkpoint", "give a base, or features: words")
        both = features.states(job.source, [*texts, *wanted])
    elif knobs.features == "file":
        return _read_vectors(knobs.vectors, examples, len(wanted))
    else:
        both = features.words([*texts, *wanted])
    return both[: len(texts)], both[len(texts) :]


def _read_vectors(path: str, examples: list[int], tests: int) -> Any:
    """Vectors of another encoder, such as all-MiniLM-L6-v2."""
    import torch

    try:
        with np.load(path, allow_pickle=False) as found:
            h, to = found["examples"].astype(np.float32), found["tests"].astype(np.float32)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"vectors={path or 'nothing'} cannot be read", str(error).splitlines()[0], "give an npz with examples and tests"
        ) from None
    if h.ndim != 2 or to.ndim != 2 or len(h) <= max(examples) or len(to) != tests or h.shape[1] != to.shape[1]:
        what = f"{path} holds examples {h.shape} and tests {to.shape}"
        raise UserError(what, f"{max(examples) + 1} or more and {tests} rows of one width are needed", "write a vector a row")
    return torch.from_numpy(h)[examples], torch.from_numpy(to)


def _written(knobs: Knobs, job: StepContext, runs: Any, effects: np.ndarray, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """influence.jsonl, the most harmful first, and kept.jsonl."""
    from modelwright.inspect.simulate.runs import write_lines

    order = np.argsort(effects, kind="stable")
    lines = [{"example": runs.examples[i], "rise_without": float(effects[i])} for i in order]
    write_lines(job.folder / "influence.jsonl", lines)
    if not rows:
        return {}
    gone = {runs.examples[i] for i in order[: round(knobs.drop * len(order))] if effects[i] < 0}
    kept = [r for i, r in enumerate(rows) if i not in gone]
    write_lines(Path(job.folder) / "kept.jsonl", kept)
    return {"rows kept": len(kept), "rows left out as harmful": len(gone), "rows that no run saw (kept)": len(rows) - len(runs.examples)}


def _result(runs: Any, test: Any, found: dict[str, np.ndarray], effects: np.ndarray, facts: dict[str, Any]) -> EvalResult:
    from modelwright.inspect.simulate.simulators import errors

    scores, best = {name: errors(f, test.phi) for name, f in found.items()}, facts["influence by"]
    between = float(runs.phi[:, -1].var(0).mean())
    metrics = {"scores": scores, "between_runs": between, "best": min(scores, key=lambda n: scores[n]["mse"]), "influence_by": best}
    low, high = float(effects.min()), float(effects.max())
    words = (
        f"Over all steps of {len(test)} runs not seen, the mean curve is off by {scores['mean curve']['mse']:.4g} (MSE), "
        f"{metrics['best']} by {scores[metrics['best']]['mse']:.4g}; the last losses of runs differ by {between:.4g} (variance). "
        f"Without one example the mean last loss would move by {low:+.2g} to {high:+.2g}, says {best}."
    )
    rows = [[n, f"{v['mse']:.5f}", f"{v['mae']:.4f}", f"{v['final_rho']:.3f}"] for n, v in scores.items()]
    table = {"title": "Simulators on runs not seen", "columns": ["simulator", "MSE over all steps", "MAE", "rho at the end"], "rows": rows}
    lines = {"true": test.phi[0].mean(1)} | {n: f[0].mean(1) for n, f in found.items()}
    plot = {"kind": "line", "title": "One run that was not seen", "x": "step", "y": "mean loss of the tests",
            "series": {n: [[runs.steps[t], float(v)] for t, v in enumerate(c)] for n, c in lines.items()}}  # fmt: skip
    tile = (f"{scores[metrics['best']]['mse']:.4f}", f"MSE of {metrics['best']}", f"mean curve {scores['mean curve']['mse']:.4f}")
    return EvalResult(metrics, words, [tile], [table], [plot], facts)


METHOD = influence
