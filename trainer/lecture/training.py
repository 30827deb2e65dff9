"""The exhibits about training: mixed precision, ring all-reduce, parallel search."""

from statistics import median

from trainer.lecture import ring
from trainer.lecture.exhibit import CIFAR10, Exhibit, Job, Results
from trainer.report.table import Table
from trainer.report.text import megabytes
from trainer.sweeps.analysis import Answer
from trainer.sweeps.analysis.answer import spread

_PRECISIONS = ("fp32", "bf16", "fp16")
_NETWORKS = {  # model, learning rate, and the published network with its top-1 % in fp32 and mixed
    "AlexNet-like": (
        (
            "model=convnet",
            *("model.in_channels=3", "model.image_size=32", "model.hidden=128", "model.depth=5"),
            *("model.kernel_size=[5,5,3,3,3]", "model.width=[16,32,48,48,32]"),
        ),
        0.02,
        "AlexNet 58.62, 58.12",
    ),
    "Inception-like": (("model=inception_cifar",), 0.1, "Inception V3 71.75, 71.17"),
    "ResNet-like": (("model=resnet_cifar", "model.depth=14"), 0.1, "ResNet-50 73.85, 73.60"),
}
PRECISION_SWEEPS = {
    network: Job(
        f"precision-{network.removesuffix('-like').lower()}",
        None,
        (
            "name=precision",
            *model,
            *(
                "data=images",
                f"data.root={CIFAR10}",
                "data.batch_size=128",
                "data.loader_workers=0",
            ),
            *("data.pad=4", "data.flip=true", f"optimizer.lr={rate}", "cluster.workers=1"),
            *("+phase@phases.train=train", "phases.train.fit.epochs=6"),
            "phases.train.fit.warmup_epochs=1",
            "+sweep.params.seed=choice(0,1,2)",
            f"+sweep.params.precision=choice({','.join(_PRECISIONS)})",
            *("sweep.sampler=grid", "sweep.pruner=none", "sweep.trials=null"),
        ),
        (
            *("cluster=inline", "cluster.threads=1", "logger=[]", "sweep.params.seed=choice(0)"),
            *("phases.train.fit.warmup_epochs=0", "phases.train.fit.max_steps=2"),
            *("phases.train.fit.epochs=1", "data.hold_out=0.01", "data.batch_size=16"),
        ),
    )
    for network, (model, rate, _) in _NETWORKS.items()
}
_LEVEL = 0.05 / (2 * len(_NETWORKS))  # of each of the tests, by Bonferroni
_REPEATS = 3
_SLOTS = (1, 2)
# Equal draws for any number of slots, and no trial ended early: the same work.
SEARCHES = {
    (slots, repeat): Job(
        f"search-{slots}-{repeat}",
        "sweep_smoke",
        (
            f"sweep.slots={slots}",
            *("sweep.sampler=random", "sweep.pruner=none", "sweep.trials=16", "data.train=10000"),
        ),
        ("sweep.trials=2", "data.train=256", "phases.train.fit.epochs=1"),
    )
    for repeat in range(_REPEATS)
    for slots in _SLOTS
}


def _precision(results: Results) -> Answer:
    rows, sentences = [], []
    for network, job in PRECISION_SWEEPS.items():
        found: dict[str, dict[int, float]] = {name: {} for name in _PRECISIONS}
        for row in results.rows(job):
            found[row.settings["precision"]][row.settings["seed"]] = row.measured["accuracy"]
        cells = [spread(list(of.values())).format(".2f", 100) for of in found.values()]
        rows.append((network, *cells, str(len(found["fp32"])), _NETWORKS[network][2]))
        for name in _PRECISIONS[1:]:
            change = spread([found[name][seed] - of for seed, of in found["fp32"].items()])
            verdict = (
                "a significant change" if change.is_significant(_LEVEL) else "no significant change"
            )
            if change.n < 2:
                verdict = "one seed allows no conclusion"
            sentences.append(
                f"{network}, {name}: {change.format('+.2f', 100)} points from fp32 on the same "
                f"seeds, {verdict} (n = {change.n})"
            )
    columns = ("network", *(f"{name} %" for name in _PRECISIONS), "n", "published: fp32, mixed")
    caption = (
        "validation accuracy, mean ± standard deviation over n seeds, after six epochs on CIFAR-10 "
        "from JPEG files; published: top-1 accuracy of the large networks on ImageNet. bf16 and "
        "fp16: FP32 master weights and sums; fp16 with dynamic loss scaling"
    )
    return Answer([Table("", columns, rows, caption, prose=columns[-1:])], sentences=sentences)


def _ring(results: Results) -> Answer:
    rows = [
        (
            f"{found['ranks']} workers, {megabytes(found['payload'])}",
            megabytes(found["sent"]),
            f"{found['sent'] / found['bound']:.4f}",
            *(f"{found[name]:.2f}" for name in ("ring", "gloo", "link")),
            f"{found['ring'] / found['link']:.2f}",
            f"{found['n']:g}",
        )
        for found in results.measured("ring")
    ]
    columns = ("", "sent", "sent / bound", "ring ms", "gloo ms", "bound ms", "ring / bound", "n")
    caption = (
        "sent: bytes of a worker for one all-reduce; bound: 2 (N-1)/N of the payload, in "
        "milliseconds the time to send so much to the next worker, without a sum; medians of n "
        "rounds in which they take turns, between processes of this machine"
    )
    return Answer([Table("", columns, rows, caption, optional=("n",))])


def _parallel(results: Results) -> Answer:
    seconds = {key: float(results.summary(job)["seconds"]) for key, job in SEARCHES.items()}
    rows = []
    for slots in _SLOTS:
        of = [seconds[slots, repeat] for repeat in range(_REPEATS)]
        ratios = [seconds[1, r] / seconds[slots, r] for r in range(_REPEATS)]
        shown = f"{median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"
        rows.append((str(slots), ", ".join(f"{s:.1f}" for s in of), *shown, f"{slots}.00"))
    columns = ("trials at a time", "seconds", "speed-up", "of the pairs", "ideal")
    caption = "the same 16 networks of different depth, kernel size and learning rate; whole sweeps"
    return Answer([Table("", columns, rows, caption)])


PRECISION = Exhibit(
    "precision",
    "Mixed precision",
    "Networks of the three kinds of the lecture's table, small enough for two cores, trained in "
    "fp32, bf16 and fp16. On CPUs, fp16 values are multiplied and summed in FP32, which is what "
    "tensor cores do.",
    "Micikevicius et al., ICLR 2018, table 1",
    110,
    _precision,
    tuple(PRECISION_SWEEPS.values()),
)
RING = Exhibit(
    "ring",
    "Data parallelism: the cost of a ring all-reduce",
    "Each worker passes sums on to the next one, all the way around. No algorithm can send less.",
    "2 (N-1)/N of the payload per worker (Patarasuk & Yuan 2009)",
    1,
    _ring,
    measure=lambda _, short: ring.measure(short),
)
PARALLEL = Exhibit(
    "parallel",
    "Hyper-parameter parallelism",
    "Alternative networks are tried at the same time, each on a worker of its own.",
    "networks do not communicate, so that the speed-up is the number of workers (the lecture)",
    15,
    _parallel,
    tuple(SEARCHES.values()),
)
