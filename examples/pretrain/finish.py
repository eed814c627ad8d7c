"""Puts a pre-trained model in its place and writes its model card from what was measured.

    python examples/pretrain/finish.py --run runs/pretrain --model examples/models/ember-6m

Copies the weights, scores the held-out texts, draws the loss curve and fills ``card.md``; for an encoder or an
encoder-decoder, ``card-denoiser.md``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ingle import inference, open_model
from ingle.config import Source, TaskConfig
from ingle.config.loader import run_from_yaml
from ingle.data import Message
from ingle.evaluation import ModelSource, evaluate, make_source
from ingle.prediction import open_predictor
from ingle.report.charts import smooth, smoothing_span

HERE = Path(__file__).parent
WEIGHTS = ("model.safetensors", "config.json")
HELD_OUT = {
    "composed documents": "heldout-documents.jsonl",
    "conversations": "heldout-conversations.jsonl",
    "books": "heldout-books.jsonl",
}
PROMPTS = ("Tell me a short story.", "What is 7 plus 5?", "How do you make tea?", "What is the capital of France?")

MASKED = (
    "The river rose over the [MASK] in the night.",
    "She put the letter on the [MASK] and closed the window.",
    "What is 7 plus 5? It is [MASK].",
)
SPANS = (
    "The river rose over <mask> in the night.",
    "She put <mask> on the table and closed <mask>.",
    "Name: Laura Oakes\nTrade: cooper\nHome: Doveley\n\nLaura Oakes is <mask>.",
)


#: What the samples of the encoder-decoder show.
FREE_TEXT = """ Its own texts
repeat themselves and stray from the source; fine-tuned, it copies well enough to be worth starting from
(`docs/benchmarks.md`)."""


def main() -> None:
    """Reads the command line and does the work."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/pretrain"), help="the finished run")
    parser.add_argument(
        "--model", type=Path, default=Path("examples/models/ember-6m"), help="folder of the tokenizer; gets the weights"
    )
    parser.add_argument("--corpus", type=Path, default=HERE / "corpus", help="folder of the held-out files")
    options = parser.parse_args()
    steps = [json.loads(line) for line in (options.run / "metrics.jsonl").read_text().splitlines()]
    report = json.loads((options.run / "report.json").read_text())
    options.model.mkdir(parents=True, exist_ok=True)
    for name in WEIGHTS:
        shutil.copyfile(options.run / "model" / name, options.model / name)
    (options.model / "loss.svg").write_text(draw(steps))
    is_causal = run_from_yaml((options.run / "run.yaml").read_text()).objective.kind == "clm"
    card = (
        write_card(options.model, options.corpus, steps, report)
        if is_causal
        else write_denoiser_card(options.run, options.model, options.corpus, steps, report)
    )
    (options.model / "README.md").write_text(card)


def write_card(model: Path, corpus: Path, steps: list[dict[str, Any]], report: dict[str, Any]) -> str:
    """``card.md`` with the figures of this run."""
    engine = open_model(str(model))
    rows = []
    for label, name in HELD_OUT.items():
        if not (corpus / name).is_file():
            continue
        task = TaskConfig(
            sources=(Source(path=str(corpus / name)),), metrics=("bits_per_byte", "perplexity"), num_samples=400
        )
        (summary,) = evaluate(ModelSource(engine.model, engine.tokenizer), [task])
        metrics = summary.metrics
        low, high = metrics["bits_per_byte"].ci95
        rows.append(
            f"| {label} | {metrics['bits_per_byte'].n} | {metrics['bits_per_byte'].value:.3f} "
            f"[{low:.3f}, {high:.3f}] | {metrics['perplexity'].value:.2f} |"
        )
    return (
        (HERE / "card.md")
        .read_text()
        .format(
            parameters=f"{sum(parameter.numel() for parameter in engine.model.parameters()):,}",
            num_steps=f"{report['num_steps']:,}",
            tokens=f"{report['num_tokens'] / 1e6:.1f}",
            hours=f"{report['train_s'] / 3600:.1f}",
            speed=f"{report['tokens_per_s']:,.0f}",
            first_loss=f"{steps[0]['loss']:.2f}",
            last_loss=f"{sum(step['loss'] for step in steps[-20:]) / 20:.2f}",
            held_out="\n".join(rows),
            answers=answer_prompts(engine),
        )
    )


def write_denoiser_card(
    run: Path, model: Path, corpus: Path, steps: list[dict[str, Any]], report: dict[str, Any]
) -> str:
    """``card-denoiser.md`` with the figures of this run."""
    source = inference.locate(str(run))
    opened = inference.load(source)
    is_encoder = source.objective().kind == "mlm"
    metrics = ("masked_accuracy", "masked_perplexity") if is_encoder else ("perplexity",)
    scored = make_source(opened.model, opened.tokenizer, source.objective(), 128)
    rows = []
    for label, name in HELD_OUT.items():
        if (corpus / name).is_file():
            task = TaskConfig(sources=(Source(path=str(corpus / name)),), metrics=metrics, num_samples=400)
            (summary,) = evaluate(scored, [task], source.objective().kind)
            found = [summary.metrics[metric] for metric in metrics]
            figures = (f"{each.value:.3f} [{each.ci95[0]:.3f}, {each.ci95[1]:.3f}]" for each in found)
            rows.append(f"| {label} | {found[0].n} | {' | '.join(figures)} |")
    return (
        (HERE / "card-denoiser.md")
        .read_text()
        .format(
            name=model.name,
            about="A small encoder that restores masked tokens."
            if is_encoder
            else "A small encoder-decoder that restores spans of text.",
            parameters=f"{sum(parameter.numel() for parameter in opened.model.parameters()):,}",
            objective=source.objective().kind,
            architecture=opened.model.config.architectures[0],
            special="`[CLS]`, `[SEP]` and `[MASK]`" if is_encoder else "`</s>` and `<mask>`",
            data=f"composed English{' and two public-domain books' if is_encoder else ''}",
            num_steps=f"{report['num_steps']:,}",
            tokens=f"{report['num_tokens'] / 1e6:.1f}",
            minutes=f"{report['train_s'] / 60:.0f}",
            recipe="encoder.yaml" if is_encoder else "encoder-decoder.yaml",
            kind="encoder" if is_encoder else "encoder-decoder",
            run=f"runs/{run.name}",
            folder=f"examples/models/{model.name}",
            first_loss=f"{steps[0]['loss']:.2f}",
            last_loss=f"{sum(step['loss'] for step in steps[-20:]) / 20:.2f}",
            metrics=" | ".join(f"{metric.replace('_', ' ')} [95 % interval]" for metric in metrics),
            columns="--:|" * len(metrics),
            held_out="\n".join(rows),
            limits="" if is_encoder else FREE_TEXT,
            samples=fill_masks(run) if is_encoder else fill_spans(run),
        )
    )


def fill_masks(run: Path) -> str:
    """The three most probable tokens for each mask."""
    predictor = open_predictor(str(run))
    rows = [predictor.make_row({"text": text}, "sample") for text in MASKED]
    lines = []
    for text, record in zip(MASKED, predictor.predict(rows, top=3), strict=True):
        fills = (f"{fill['token']} ({fill['probability']:.0%})" for fill in record["masks"][0]["fills"])
        lines.append(f"> **{text}**  \n> {', '.join(fills)}\n")
    return "\n".join(lines)


def fill_spans(run: Path) -> str:
    """The texts that the model writes for texts with hidden spans, by greedy decoding."""
    engine = open_model(str(run))
    lines = []
    for text, generation in zip(SPANS, engine.generate(list(SPANS), max_new_tokens=40), strict=True):
        source, written = (escape(part.strip(), quote=False).replace("\n", " / ") for part in (text, generation.text))
        lines.append(f"> **{source}**  \n> {written}\n")
    return "\n".join(lines)


def answer_prompts(engine: Any) -> str:
    """A few prompts and what the model says to them."""
    generations = engine.generate([[Message("user", prompt)] for prompt in PROMPTS], max_new_tokens=120)
    return "\n".join(
        f"> **{prompt}**  \n> {generation.text.strip()}".replace("\n\n", "\n>\n> ") + "\n"
        for prompt, generation in zip(PROMPTS, generations, strict=True)
    )


def draw(steps: list[dict[str, Any]], width: int = 720, height: int = 260) -> str:
    """The loss curve, each step faint and the moving mean strong, as an SVG that stands alone."""
    losses = np.array([step["loss"] for step in steps])
    top, last = float(losses.max()), len(losses)

    def points(values: Any) -> str:
        pairs = ((40 + index / last * (width - 50), 10 + (1 - value / top) * (height - 40)) for index, value in values)
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in pairs)

    grid = "".join(
        f'<text x="4" y="{14 + (1 - level / top) * (height - 40):.0f}">{level}</text>'
        f'<path d="M40 {10 + (1 - level / top) * (height - 40):.0f}H{width - 10}" stroke="#8884"/>'
        for level in range(0, int(top) + 1, 2)
    )
    ticks = "".join(
        f'<text x="{36 + step / last * (width - 50):.0f}" y="{height - 8}">{step}</text>'
        for step in range(0, last + 1, max(1, last // 5))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="training loss over steps" font-family="sans-serif" font-size="11" fill="#888">'
        f'<rect width="{width}" height="{height}" fill="#fff"/>{grid}{ticks}'
        f'<polyline fill="none" stroke="#d9480f" stroke-opacity="0.3" points="{points(enumerate(losses))}"/>'
        f'<polyline fill="none" stroke="#d9480f" stroke-width="2" '
        f'points="{points(enumerate(smooth(losses, smoothing_span(last))))}"/></svg>\n'
    )


if __name__ == "__main__":
    main()
