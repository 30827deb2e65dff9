"""The exhibits about Deep Compression: Huffman coding, the table, distributions, the LSTM."""

from functools import partial
from statistics import fmean
from typing import Any

from trainer.compress.coding.huffman import code_lengths
from trainer.driver.report import shared_distributions
from trainer.experiment import Experiment
from trainer.lecture.exhibit import Exhibit, Job, Results
from trainer.report import plots
from trainer.report.table import Table
from trainer.report.text import perplexity
from trainer.store.directory import RunDirectory
from trainer.sweeps.analysis import Answer
from trainer.sweeps.analysis.answer import spread

FEW = ("cluster=inline", "cluster.threads=1", "logger=[]")
FEW_DIGITS = (*FEW, "data.train=256", "data.validation=64", "data.test=64")


def _short(*phases: str) -> tuple[str, ...]:
    return tuple(f"phases.{phase}.fit.epochs=1" for phase in phases)


_CHAIN = (*FEW_DIGITS, *_short("train", "prune", "retrain", "share"))
LENET300 = tuple(
    Job(f"lenet300-{seed}", "deep_compression_lenet300", (f"seed={seed}",), _CHAIN)
    for seed in range(3)
)
LENET5 = tuple(
    Job(f"lenet5-{seed}", "deep_compression", (f"seed={seed}",), _CHAIN) for seed in range(3)
)
# The densities and bits of Han, Mao & Dally, ICLR 2016, tables 4 and 5.
HAN300 = Job(
    "lenet300-published",
    "deep_compression_lenet300",
    (
        "phases.prune.sparsity=0.92",
        "phases.prune.overrides={fc2: 0.91, fc3: 0.74}",
        *("phases.share.bits=6", "phases.share.biases=null", "phases.share.rate=0"),
    ),
    _CHAIN,
)
HAN5 = Job(
    "lenet5-published",
    "deep_compression",
    (
        "phases.prune.sparsity=0.92",
        "phases.prune.overrides={conv1: 0.34, conv2: 0.88, fc2: 0.81}",
        "phases.share.bits=5",
        "+phases.share.overrides={conv*: 8}",
        *("phases.share.biases=null", "phases.share.rate=0"),
    ),
    _CHAIN,
)
LSTM = Job(
    "lstm",
    "lstm_text",
    short=(*FEW, "model.hidden=16", *_short("train", "prune", "retrain", "share"), *(
        f"phases.{phase}.fit.max_steps=2" for phase in ("train", "prune", "retrain", "share")
    )),
)  # fmt: skip

_PAPER = "Han, Mao & Dally, Deep Compression, ICLR 2016"
# Network: error before and after in %, ratios of P+S and of P+S+H; P: density.
_PUBLISHED: dict[str, tuple[float, float, float, float, float]] = {
    "LeNet-300-100": (1.64, 1.58, 8, 32, 40),
    "LeNet-5": (0.80, 0.74, 8, 33, 39),
    "AlexNet": (42.78, 42.78, 11, 27, 35),
    "VGG-16": (31.50, 31.17, 7.5, 31, 49),
}


def _huffman(_: Results) -> Answer:
    counts = (24, 5, 4, 3)
    lengths = code_lengths(counts)
    rows = [
        (f"cluster {i}", str(count), "2", str(length), f"{2 * count}", f"{length * count}")
        for i, (count, length) in enumerate(zip(counts, lengths, strict=True))
    ]
    plain, coded = 2 * sum(counts), sum(c * n for c, n in zip(counts, lengths, strict=True))
    rows.append(("all", str(sum(counts)), "", "", str(plain), str(coded)))
    rows.append(("published", "36", "", "1, 2, 3, 3", "72", "55"))
    columns = ("", "weights", "bits of an index", "bits of a code", "all indices", "all codes")
    return Answer([Table("36 weights in 4 clusters", columns, rows)])


HUFFMAN = Exhibit(
    "huffman",
    "Huffman coding: frequent values get short codes",
    "The lecture's example, coded by this program.",
    "72 bits as indices, 55 as codes (the lecture)",
    0,
    _huffman,
)


def _published(network: str) -> tuple[str, ...]:
    """The published row of a network, with the columns of `_deep_compression`."""
    before, after, _, shared, coded = _PUBLISHED[network]
    ratios = (f"{shared:g}x", f"{coded:g}x")
    return (network, "published", f"{before:.2f}", *ratios, f"{after:.2f}", "")


def _deep_compression(results: Results) -> Answer:
    rows: list[tuple[str, ...]] = []
    for network, jobs, published_job in (
        ("LeNet-300-100", LENET300, HAN300),
        ("LeNet-5", LENET5, HAN5),
    ):
        rows.append(_published(network))
        rows.append(("", "published densities and bits", *_cells([results.summary(published_job)])))
        rows.append(("", "settings of the experiment", *_cells([results.summary(j) for j in jobs])))
    for network in ("AlexNet", "VGG-16"):
        rows.append(_published(network))
    return Answer(
        [
            Table(
                "",
                ("network", "run", "error before %", "P+S", "P+S+H", "error after %", "model.dcz"),
                rows,
                "P: pruned, S: values shared, H: Huffman-coded; both ratios in the published "
                "format, with the bytes of positions. model.dcz: this file's decoded "
                "weights have the error after. Test set; means ± standard deviation "
                "over three seeds. AlexNet and VGG-16 need ImageNet, which does not ship.",
                prose=("run",),
            )
        ]
    )  # fmt: skip


def _cells(summaries: list[dict[str, Any]]) -> tuple[str, ...]:
    found = [summary["artifact"] for summary in summaries]
    before = spread([1 - made["baseline_accuracy"] for made in found]).format(".2f", 100)
    after = spread([1 - made["accuracy"] for made in found]).format(".2f", 100)
    shared, coded = (
        f"{fmean(_stage(made, name)['ratio'] for made in found):.0f}x"
        for name in ("P+S", "P+S+H (Han's format)")
    )
    return before, shared, coded, after, f"{fmean(made['ratio'] for made in found):.0f}x"


def _stage(made: dict[str, Any], name: str) -> dict[str, Any]:
    return next(stage for stage in made["stages"] if stage["name"] == name)


DEEP_COMPRESSION = Exhibit(
    "deep-compression",
    "Deep Compression",
    "Pruning, sharing and coding one after the other, down to a file that is decoded and measured "
    "again: once with the published densities and bits, and with the settings of this program.",
    f"{_PAPER}, tables 1, 4 and 5",
    45,
    _deep_compression,
    (HAN300, *LENET300, HAN5, *LENET5),
)


def _distributions(results: Results) -> Answer:
    directory = RunDirectory(results.job(HAN300))
    experiment = Experiment.from_config(directory.read_config())
    missing: list[str] = []
    found = shared_distributions(experiment, directory, missing.append)
    answer = Answer(sentences=missing)
    for index, tensor in enumerate(found):
        answer.figures[tensor.name] = partial(plots.distribution, index, tensor)
    return answer


DISTRIBUTIONS = Exhibit(
    "distributions",
    "Weights before and after sharing",
    "LeNet-300-100, pruned to the published densities and shared with 6 bits. Zeros are left out.",
    f"{_PAPER}, figure 5: two peaks around the gap that pruning left, then 2^bits values",
    5,
    _distributions,
    (HAN300,),
)


def _lstm(results: Results) -> Answer:
    made = results.summary(LSTM)["artifact"]
    rows = [
        (
            stage["name"],
            f"{stage['bytes']:,}",
            f"{stage['ratio']:.1f}x",
            f"{perplexity(stage['loss']):.3f}",
            f"{1 - stage['accuracy']:.1%}",
        )
        for stage in made["stages"]
    ]
    return Answer(
        [
            Table(
                "A character-level LSTM, 90% pruned",
                ("stage", "bytes", "ratio", "perplexity", "wrong characters"),
                rows,
                "on the test text",
            )
        ]
    )


LSTM_EXHIBIT = Exhibit(
    "lstm",
    "A pruned LSTM",
    "The lecture prunes a network that writes captions for images by 90%: its sentences stay as "
    "good. Here it is a language model of characters, which needs no images.",
    "90% of the weights of an LSTM pruned, same quality (the lecture)",
    8,
    _lstm,
    (LSTM,),
)
