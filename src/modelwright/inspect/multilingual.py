"""How a checkpoint and a corpus treat languages: balance, tokenizer, shared space, stereotypes, and what taking them out costs.

When to use it: before training on several languages, and to see what a model does with them.

Paper: the survey 2404.00929 on corpora, alignment and bias of multilingual models. It has no system: this report computes the measures that
it names. Each part is made where its data are given.

- `data` with a column `language`, or `parallel`: shares, entropy H, exp(H) languages in effect, Gini; sampling with q^alpha; UniMax
  (2304.09151) with at most `epochs` passes. Sizes of `parallel` are bytes over all of its splits.
- `parallel`, a folder of STEM.LANGUAGE files: tokens per word and byte, and the premium tokens(language) / tokens(pivot) on the same
  sentences. In every layer, with mean-pooled states: P@1 of the translation by cosine and by CSLS, linear CKA, Procrustes residual, a lower
  bound of the Gromov-Hausdorff distance, spectra of the neighbour graphs, a linear probe for the language, anisotropy.
  Then the language is taken out of one layer by centring, INLP or LEACE: probe and P@1 on sentences that nothing was fitted on, and the
  loss of a causal model that has to go on from the changed states.
- `crows`: percent of CrowS-Pairs whose stereotyped sentence is the more likely one. For causal models that is the log-likelihood of the
  sentence, for masked ones the pseudo-log-likelihood of the shared tokens; the two are not comparable with each other.
- `seat`: effect sizes and one-sided permutation tests of WEAT and SEAT sets, all partitions where there are at most 20,000, and the sizes
  after INLP, LEACE and hard debiasing fitted on the test's own groups.
- `stereoset`: lms, ss and icat.

Scores near the even-handed value can also come from a model that does not understand the sentences: look at the loss first.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelwright.core.data.read import iter_rows
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data, knob
from modelwright.core.step import EvalResult, StepContext
from modelwright.inspect.languages import balance, pages, texts

if TYPE_CHECKING:
    from modelwright.inspect.languages.vectors import Reader


@dataclass(frozen=True)
class Knobs:
    parallel: str | None = knob(None, "folder of parallel text: files such as test.en, test.de.gz", path=True)
    split: str = knob("", "split of the parallel text, such as test; empty: most languages, then fewest sentences")
    pivot: str = knob("en", "language that the others are compared with")
    sentences: int = knob(300, "parallel sentences, at most", low=20)
    data: Data = knob(Data(), "documents with a language each, for the balance of a corpus")
    language: str = knob("language", "column of data that names the language")
    alphas: list[float] = knob([1.0, 0.7, 0.3, 0.0], "exponents of the sampling plans")
    epochs: float = knob(4.0, "UniMax: passes over a language's text, at most", low=0.01)
    crows: str | None = knob(None, "CrowS-Pairs: the csv, or its folder", path=True)
    seat: str | None = knob(None, "WEAT and SEAT sets: a json file, or a folder of them", path=True)
    stereoset: str | None = knob(None, "StereoSet: the json file", path=True)
    pairs: int | None = knob(None, "pairs of CrowS-Pairs and triples of StereoSet, at most", low=1)
    layer: int | None = knob(None, "layer for SEAT and for taking the language out, 0: the embeddings; empty: the middle one", low=0)


def multilingual(knobs: Knobs, job: StepContext) -> EvalResult:
    """The report. Raises UserError where nothing was given to look at, or a checkpoint is missing."""
    if not (knobs.parallel or knobs.data.path or knobs.crows or knobs.seat or knobs.stereoset):
        raise UserError(
            "nothing to look at was given", how="give --parallel, --crows, --seat, --stereoset, or --data with a language column"
        )
    result = EvalResult({})
    if knobs.data.path or knobs.parallel:
        _balance(knobs, result)
    reader = None
    if knobs.crows or knobs.seat or knobs.stereoset or (knobs.parallel and job.source is not None):
        if job.source is None:
            raise UserError("no checkpoint was given", "its vectors and likelihoods are measured", "give --base CHECKPOINT")
        from modelwright.inspect.languages.vectors import Reader

        reader = Reader(job.source)
    if reader and knobs.parallel:
        _shared(knobs, job, reader, result)
    if reader:
        _bias(knobs, job, reader, result)
        result.facts |= {"model is": reader.kind, "sentences cut at the context": reader.cut}
    result.text = " ".join(filter(None, result.text.split("\n")))
    return result


def _say(result: EvalResult, sentence: str) -> None:
    result.text += sentence + "\n"


# ---- a corpus -----------------------------------------------------------------------------------------------------------
def _balance(knobs: Knobs, result: EvalResult) -> None:
    sizes, unit = _sizes(knobs)
    plan = balance.unimax(sizes, sum(sizes.values()), knobs.epochs)
    found = {
        "unit": unit,
        "sizes": sizes,
        "shares": balance.shares(sizes),
        "entropy": balance.entropy(sizes),
        "effective_languages": float(2.718281828459045 ** balance.entropy(sizes)),
        "gini": balance.gini(sizes),
        "distance_to_even": balance.distance(sizes, dict.fromkeys(sizes, 1.0)),
        "sampling": {str(a): balance.tempered(sizes, a) for a in knobs.alphas},
        "unimax_epochs": balance.passes(plan, sizes),
    }
    result.metrics["balance"] = found
    result.tables += pages.balance_table(found)
    _say(result, f"The corpus has {len(sizes)} languages, {found['effective_languages']:.2f} in effect.")


def _sizes(knobs: Knobs) -> tuple[balance.Sizes, str]:
    """Bytes of each language. Raises UserError for a row without a language or text, and for a language without text."""
    count: Counter[str] = Counter()
    if knobs.data.path:
        column = knobs.data.column or "text"
        for i, row in enumerate(iter_rows(knobs.data), 1):
            for name in (knobs.language, column):
                if not isinstance(row.get(name), str):
                    why = "a document has a text and a language"
                    raise UserError(f"row {i} of {knobs.data.path} has no text in '{name}'", why, "check --language and data.column")
            count[row[knobs.language]] += len(row[column].encode())
    else:
        for files in texts.stems(Path(str(knobs.parallel))).values():
            for language, file in files.items():
                count[language] += sum(len(line.encode()) for line in texts.lines(file))
    for language, size in count.items():
        if not size:
            raise UserError(f"{language} has no text", "its share would be nothing", "leave the language out")
    if not count:
        raise UserError("the corpus is empty", how="give documents with a language each")
    return {k: float(count[k]) for k in sorted(count)}, "bytes"


# ---- a model ------------------------------------------------------------------------------------------------------------
def _layer(knobs: Knobs, layers: int) -> int:
    """The chosen layer of `layers` blocks and the embeddings."""
    if knobs.layer is None:
        return (layers + 1) // 2
    if knobs.layer > layers:
        raise UserError(f"layer={knobs.layer} but the model has {layers} blocks", how=f"choose 0 to {layers}")
    return knobs.layer


def _shared(knobs: Knobs, job: StepContext, reader: "Reader", result: EvalResult) -> None:
    from modelwright.inspect.languages import shared
    from modelwright.inspect.languages.tokens import premiums, token_costs

    split, of = texts.parallel(Path(str(knobs.parallel)), knobs.split, knobs.pivot, knobs.sentences)
    costs = {k: token_costs(reader.tokenizer, sentences) for k, sentences in of.items()}
    premium = premiums(costs, knobs.pivot)
    result.metrics["tokenizer"] = {k: c | {"premium": premium[k]} for k, c in costs.items()}
    result.tables += pages.token_table(costs, premium)
    with job.progress.task("shared space", len(of)) as tick:
        vectors = {}
        for language, sentences in of.items():
            vectors[language] = reader.pooled(sentences)
            tick(1)
    count = len(of[knobs.pivot])
    halves = shared.Halves.of(count, job.seed)
    layers = shared.by_layer(vectors, knobs.pivot, halves)
    tables, plots = pages.layer_pages(layers, len(of), count)
    layer = _layer(knobs, len(layers) - 1)
    without = shared.debiased(vectors, knobs.pivot, layer, halves, reader, of[knobs.pivot])
    result.metrics |= {"split": split, "sentences": count, "layers": layers, "layer": layer, "without_language": without}
    result.tables += [*tables, *pages.debias_table(without, layer)]
    result.plots += plots
    best = max(range(len(layers)), key=lambda i: sum(layers[i]["precision_at_1"].values()))
    at = layers[best]["precision_at_1"]
    mean, worst = sum(at.values()) / len(at), max(premium, key=lambda k: premium[k])
    result.tiles += [
        (f"{premium[worst]:.2f} x", f"tokens for {worst}", f"against {knobs.pivot}, same sentences"),
        (f"{100 * mean:.1f} %", "translations found first", f"layer {best}; chance {100 / count:.1f} %"),
    ]
    _say(
        result, f"{worst} costs {premium[worst]:.2f} times the tokens of {knobs.pivot}. Translations are found first in {100 * mean:.1f} %."
    )


def _bias(knobs: Knobs, job: StepContext, reader: "Reader", result: EvalResult) -> None:
    from modelwright.inspect.languages import stereotypes

    if knobs.crows:
        with job.progress.task("CrowS-Pairs"):
            found = result.metrics["crows_pairs"] = stereotypes.crows(reader, Path(knobs.crows), knobs.pairs)
        _add(result, pages.crows_pages(found))
        low, high = found["interval"]
        result.tiles.append(
            (f"{found['stereotype_preferred']:.1f} %", "stereotypes preferred", f"CrowS-Pairs; 95 %: {low:.1f} to {high:.1f}")
        )
        _say(result, f"Of {found['pairs']:,} pairs the stereotyped sentence is preferred in {found['stereotype_preferred']:.1f} %.")
    if knobs.seat:
        with job.progress.task("SEAT"):
            layer = _layer(knobs, int(reader.model.config.get_text_config().num_hidden_layers))
            sets = result.metrics["seat"] = stereotypes.associations(reader, Path(knobs.seat), layer, job.seed)
        _add(result, pages.seat_pages(sets))
        few = sum(of["p"] < 0.05 for of in sets.values())
        _say(result, f"{few} of {len(sets)} associations have p below 0.05; chance alone gives {0.05 * len(sets):.1f}.")
    if knobs.stereoset:
        result.metrics["stereoset"] = stereotypes.stereoset(reader, Path(knobs.stereoset), knobs.pairs)
        _say(result, f"StereoSet: icat {result.metrics['stereoset']['icat']:.1f}.")


def _add(result: EvalResult, more: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> None:
    result.tables += more[0]
    result.plots += more[1]


METHOD = multilingual
