"""The Python API: live objects in, a verified model out, without the command."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.version import VersionBase
from optuna.distributions import IntDistribution
from torch import Tensor, nn
from torch.utils.data import Dataset

import trainer
from trainer import ConfigError, LimitsMissed
from trainer.config.compose import compose_config
from trainer.messages import Message, PhaseEnded
from trainer.models import ConvNet, LeNet300
from trainer.phases import Prune, Quantize, Retrain, Share, StructuralPhase, Train

pytestmark = pytest.mark.usefixtures("elsewhere")
INLINE = {"cluster": {"backend": "inline", "threads": 1}, "progress": False}
PHASES = [Train(epochs=2), Prune(0.5), Retrain(epochs=1), Share(bits=3)]


def samples(n: int) -> tuple[Tensor, Tensor]:
    """Points in four dimensions whose class is their largest coordinate."""
    inputs = torch.randn(n, 4, generator=torch.Generator().manual_seed(n))
    return inputs, inputs.argmax(1)


DATA = (samples(200), samples(50), samples(60))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4))


def hooked() -> nn.Module:
    model = net()
    next(model.parameters()).register_hook(lambda gradient: gradient * 0)
    return model


class Locked(nn.Sequential):
    """Cannot be copied."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4))
        self.lock = threading.Lock()


def run(**changes: Any) -> trainer.Result:
    return trainer.run(**{"model": net(), "data": DATA, "phases": PHASES, **INLINE, **changes})


@pytest.mark.slow
def test_from_objects_to_a_verified_file() -> None:
    result = run(artifact=True, lr=0.1, out="runs/first")
    assert result.status == "done"
    assert result.artifact == Path("runs/first/model.dcz").resolve()
    assert result.metrics["accuracy"] > 0.5
    inputs, targets = DATA[2]
    found = (result.model(inputs).argmax(1) == targets).float().mean().item()
    assert found == pytest.approx(result.metrics["accuracy"])
    loaded = trainer.load(result.artifact, net())
    assert torch.equal(loaded(inputs), result.model(inputs))
    assert torch.equal(trainer.load("runs/first", net())(inputs), loaded(inputs))
    assert [phase["name"] for phase in result.phases] == ["train", "prune", "retrain", "share"]
    assert "done: accuracy=" in repr(result)
    html = result._repr_html_()
    assert html.count("<svg") == 3  # loss, accuracy and compression
    assert "model.dcz: layers" in html
    assert run(phases=[Train()], out="runs/first").folder.name == "first-2"


def test_a_given_model_keeps_its_weights_and_is_the_dense_model() -> None:
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = run(model=model, phases=[Prune(0.5)])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for name, value in result.model.state_dict().items():
        kept = value != 0
        assert torch.equal(value[kept], before[name][kept])
    with torch.no_grad():
        right = (model(DATA[2][0]).argmax(1) == DATA[2][1]).float().mean().item()
    assert result.summary["baseline_accuracy"] == pytest.approx(right)


@pytest.mark.slow
def test_a_class_is_built_under_the_seed() -> None:
    settings = {"phases": [Train(epochs=1)], "data": trainer.data.mnist(train=32, validation=8)}
    model = partial(ConvNet, depth=1, width=2)
    first, again, other = (run(model=model, seed=seed, **settings) for seed in (1, 1, 2))
    states = [list(result.model.state_dict().values()) for result in (first, again, other)]
    assert all(map(torch.equal, states[0], states[1]))
    assert not all(map(torch.equal, states[0], states[2]))


class Points(Dataset[Any]):
    def __init__(self, n: int) -> None:
        self.inputs, self.targets = samples(n)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Any:
        return self.inputs[index], self.targets[index]


@pytest.mark.parametrize(
    ("data", "sizes"),
    [
        ((Points(40), Points(10), Points(12)), [40, 10, 12]),
        ({"train": Points(40), "test": Points(12)}, [36, 4, 12]),
        (Points(40), [32, 4, 4]),
        (samples(40), [32, 4, 4]),
        ([part.numpy() for part in samples(40)], [32, 4, 4]),
        (torch.utils.data.TensorDataset(*samples(40)), [32, 4, 4]),
        (trainer.data.as_splits(samples(50)), [40, 5, 5]),
        ([*Points(40)], [32, 4, 4]),
        ([[*Points(40)], [*Points(10)], [*Points(12)]], [40, 10, 12]),
    ],
    ids=[
        *("datasets", "mapping", "dataset", "tensors", "arrays", "tensor dataset", "splits"),
        *("pairs", "lists of pairs"),
    ],
)
def test_data_in_many_forms(data: Any, sizes: list[int]) -> None:
    made = trainer.Experiment(model=net, data=data, phases=[Train()]).build_data()
    assert [len(made.train), len(made.validation), len(made.test)] == sizes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": 3}, "data is a int: pass Splits, a Dataset or a list of "),
        ({"data": torch.utils.data.DataLoader(Points(9))}, "pass its dataset and batch_size"),
        ({"data": [torch.utils.data.DataLoader(Points(9))] * 3}, "data.train is a DataLoader, but"),
        ({"cluster": "inlin"}, "cluster/inlin: there is no such file; did you mean inline"),
        ({"cluster": 3}, "cluster=3: pass a mapping"),
        ({"limits": "tight"}, "limits='tight': pass a mapping"),
        ({"logger": ["csv", "disk"]}, "logger/disk: there is no such file; there are csv, mlflow"),
        ({"optimizer": "adamax"}, "optimizer/adamax: there is no such file; .*there are adam, "),
        ({"task": "custom"}, "task='custom' has no task.loss: pass an object or a mapping"),
        ({"task": {"loss": "model"}}, r"task is a dict: .*trainer\.tasks\.Custom\(loss="),
        ({"task": nn.MSELoss()}, r"a loss is passed as trainer\.tasks\.Custom\(loss=\.\.\.\)"),
        ({"data": {"train": Points(9), "valid": Points(9)}}, "data: unknown keys valid"),
        ({"data": samples(3)}, "2 times 0 of 3 training samples cannot be held out"),
        ({"phases": [Train]}, "pass objects of subclasses of Phase, such as Train"),
        ({"phases": [Prune(0.5), Train()]}, "phase 'train' .* would destroy the zeros"),
        ({"phases": []}, "phases: there are none"),
        ({"phases": Train()}, r"phases is a Train: pass a list .*, such as \[Train"),
        ({"phases": [Prune(0.5, include="0")]}, r"phases.prune.include: it must be a list, such"),
        ({"model": torch.jit.script(net())}, "modules of torch.jit cannot be changed"),  # type: ignore[no-untyped-call]
        ({"model": nn.Sequential(torch.jit.script(net()))}, "model.0: modules of torch.jit"),  # type: ignore[no-untyped-call]
        ({"model": net().to("meta")}, "0.weight is on the meta device, so that it has no values"),
        ({"model": hooked()}, r"0\.weight has a hook \(register_hook\), which the copies"),
        ({"model": Locked}, r"Locked cannot be copied \(copy.deepcopy\): .*remove what cannot be"),
        ({"artifact": "yes"}, "artifact='yes': pass True, False, or a mapping"),
        ({"batch_size": 0}, "data.batch_size=0"),
        ({"precision": "int8"}, "precision=int8: it must be one of fp32"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)])}, "optimizer: pass its class"),
        ({"model": 3}, "model is a int: pass an nn.Module"),
        ({"artifact": {"size": 3}}, "artifact.size: .*known keys: make"),
    ],
)
def test_a_wrong_argument_is_one_line_and_leaves_nothing(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(**changes)
    assert not list(Path.cwd().iterdir())


def test_settings_in_short_forms() -> None:
    config = trainer.Experiment(
        model=net,
        data=DATA,
        phases=PHASES,
        artifact={"coder": "huffman"},
        recompute="0",
        init_from="weights.pt",
        init_skip="0.*",
    ).config
    assert config.artifact.make
    assert (config.recompute, config.init_skip) == (["0"], ["0.*"])


def test_inline_runs_of_two_threads_take_turns() -> None:
    model = nn.Sequential(net(), nn.Dropout(0.5))
    start = partial(run, model=model, phases=[Train(epochs=1)], cluster="inline", out="a")
    with ThreadPoolExecutor(2) as threads:
        one, other = [future.result() for future in [threads.submit(start) for _ in range(2)]]
    assert one.summary["loss"] == other.summary["loss"]
    assert {path.name for path in Path.cwd().iterdir()} == {"a", "a-2"}


def test_an_argument_that_is_not_taken_is_refused() -> None:
    with (
        trainer.Session(cluster="inline") as session,
        pytest.raises(ConfigError, match="workers: the workers are those of the session; pass it"),
    ):
        session.run(model=net, data=DATA, phases=PHASES, workers=2)
    Path("config.yaml").write_text("name: a")
    with pytest.raises(ConfigError, match=r"modle: resume takes no such argument; .*, logger, mod"):
        trainer.resume(".", modle=net())
    Path("config.yaml").write_text("a: 'b\n\nc")
    with pytest.raises(
        ConfigError, match=r"config\.yaml is damaged: while scanning .* line 1"
    ) as raised:
        trainer.resume(".")
    assert "\n" not in str(raised.value)


def test_what_is_no_experiment_is_refused() -> None:
    for call in (trainer.run, partial(trainer.sweep, params={"seed": "range(2)"})):
        with pytest.raises(ConfigError, match=r"experiment is a Sequential: pass a trainer\.Exp"):
            call(net())  # type: ignore[arg-type]
    experiment = trainer.Experiment(model=net(), data=DATA, phases=PHASES, cluster="inline")
    with pytest.raises(ConfigError, match=r"no model\.0; it was passed as an object: pass"):
        trainer.sweep(experiment, {"model.0": "choice(1,2)"})


@pytest.mark.parametrize(
    "content", [b"", b"DCZ", b"hello", b"name: experiment\n", b"\2\0\0\0\0\0\0\0[]"]
)
def test_a_file_of_another_kind_is_not_loaded(content: bytes) -> None:
    Path("model.bin").write_bytes(content)
    with pytest.raises(trainer.artifact.ArtifactError, match=r"model.bin: neither a .dcz nor a"):
        trainer.load("model.bin", net())
    with pytest.raises(
        ConfigError, match=r"model is a function: pass a module, such as LeNet5\(\)"
    ):
        trainer.load("model.bin", net)  # type: ignore[arg-type]


def test_an_experiment_and_settings_exclude_each_other() -> None:
    experiment = trainer.Experiment(model=net, data=DATA, phases=PHASES)
    with pytest.raises(ConfigError, match="not both: seed"):
        trainer.run(experiment, seed=3)


def test_compose_returns_what_the_command_runs() -> None:
    experiment = trainer.compose("smoke", "seed=3", "phases.prune.sparsity=0.7")
    assert experiment.config.seed == 3
    assert list(experiment.phases) == ["train", "prune", "retrain", "share"]
    assert experiment.phases["prune"].sparsity == 0.7  # type: ignore[attr-defined]
    again = trainer.Experiment.from_config(experiment.settings())
    assert again.config == experiment.config


def test_composing_leaves_a_hydra_program_of_the_caller_alone() -> None:
    with hydra.initialize(None, job_name="mine", version_base="1.2"):
        HydraConfig.instance().set_config(hydra.compose(return_hydra_config=True))
        try:
            before = {kind: kind.instance() for kind in (GlobalHydra, HydraConfig, VersionBase)}
            loaded = GlobalHydra.instance().hydra
            plain = compose_config(["name=${hydra:job.name} ${seed}", "seed=3"]).plain()
            assert plain["name"] == "trainer 3"
            assert trainer.compose("smoke").name == "smoke"
            with pytest.raises(ConfigError, match="modl"):
                trainer.compose("smoke", "modl=lenet5")
            assert {kind: kind.instance() for kind in before} == before
            assert GlobalHydra.instance().hydra is loaded
            assert HydraConfig.get().job.name == "mine"
            assert hydra.compose(return_hydra_config=True).hydra.job.name == "mine"
            assert str(VersionBase.instance().getbase()) == "1.2"
        finally:
            HydraConfig.instance().cfg = None


def test_a_missed_limit_comes_with_its_result() -> None:
    with pytest.raises(LimitsMissed, match=r"limits\.min_ratio=1000") as caught:
        run(artifact=True, limits={"min_ratio": 1000})
    assert caught.value.result.status == "limits"
    assert caught.value.result.metrics["accuracy"] > 0


class StopOnce:
    """A sink that sends Ctrl-C after the first phase. No other process can import its class."""

    def on(self, message: Message) -> None:
        if isinstance(message, PhaseEnded) and message.index == 0:
            os.kill(os.getpid(), signal.SIGINT)

    def close(self) -> None:
        pass


@pytest.mark.slow
def test_interrupted_and_resumed_it_ends_in_the_same_bits() -> None:
    handler = signal.getsignal(signal.SIGINT)
    undisturbed = run(out="a")
    with pytest.raises(KeyboardInterrupt):
        run(out="b", logger={"stop": StopOnce()})
    assert signal.getsignal(signal.SIGINT) is handler
    assert (Path("b/objects.pkl").stat().st_mode & 0o777) == 0o600
    result = trainer.resume("b", progress=False)
    for first, second in zip(
        undisturbed.model.state_dict().values(), result.model.state_dict().values(), strict=True
    ):
        assert torch.equal(first, second)
    again = trainer.resume(
        "b", limits={"max_accuracy_drop": 1.0}, cost={"price": 7.0}, progress=False
    )
    assert again.metrics == result.metrics
    cost = again.summary["cost"]
    assert cost["price"] == pytest.approx(7 * cost["kwh"])


class Collect:
    """Keeps what it receives; it cannot be copied."""

    def __init__(self) -> None:
        self.kinds: list[str] = []

    def on(self, message: Message) -> None:
        self.kinds.append(type(message).__name__)

    def close(self) -> None:
        self.kinds.append("closed")

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("it holds an open file")


def test_a_given_sink_itself_receives_every_message() -> None:
    sink = Collect()
    run(phases=[Train()], logger={"mine": sink})
    assert sink.kinds[-2:] == ["RunEnded", "closed"]
    assert {"RunStarted", "EpochEnded", "PhaseEnded", "Evaluated"} <= set(sink.kinds)


def test_values_of_hydra_are_those_of_the_composition() -> None:
    compose = [r"name='\${hydra:job.name}'", "task.loss=${hydra:output_subdir}"]
    plain = compose_config(compose).plain()
    assert plain["name"] == "${hydra:job.name}"  # as it is escaped
    assert plain["task"]["loss"] is None  # Hydra's value
    for absent in ("nothing", "job.num"):
        with pytest.raises(ConfigError, match=rf"^\${{hydra:{absent}}}: Hydra has no such value"):
            compose_config([f"name=run-${{hydra:{absent}}}"])


def test_no_loggers_can_be_chosen() -> None:
    result = run(phases=[Train()], logger=[], out="none")
    assert trainer.resume("none", progress=False).metrics == result.metrics
    with pytest.raises(ConfigError, match=r"cluster=\[\]: pass a mapping"):
        trainer.Session(cluster=[])  # type: ignore[arg-type]


class Unpicklable(Points):
    def __reduce__(self) -> Any:
        raise TypeError("no pickle")


def test_objects_that_cannot_be_stored_are_passed_again(capsys: Any) -> None:
    data = [Unpicklable(n) for n in (40, 10, 10)]
    settings = {"data": data, "phases": [Train()], "out": "c", "progress": True}
    with pytest.raises(KeyboardInterrupt):
        run(**settings, logger={"stop": StopOnce()})
    assert "cannot be stored in the run directory (no pickle)" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"passed as a Python object.*trainer\.resume"):
        trainer.resume("c", progress=False)
    assert trainer.resume("c", data=data, model=net(), logger={"stop": StopOnce()}).status == "done"


def test_the_command_refuses_a_run_with_objects(capsys: Any) -> None:
    from trainer.__main__ import main

    run(out="d", phases=[Train()])
    assert main(["resume=d"]) == 2
    assert "resume it there: trainer.resume('d')" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_over_objects(capsys: Any) -> None:
    experiment = trainer.Experiment(
        model=partial(LeNet300, classes=4),
        data={"_target_": f"{__name__}.flat"},
        phases=[Train(epochs=1), Prune(0.5)],
        cluster=INLINE["cluster"],
    )
    params = {"phases.prune.enabled": [True, False], "model.classes": IntDistribution(4, 5)}
    capsys.readouterr()
    found = trainer.sweep(
        experiment, params, sampler="grid", slots=1, out="s", refit=True, progress=False
    )
    assert capsys.readouterr().out == ""
    assert len(found.trials) == 4
    assert set(found.best_params) == set(params)
    assert found.best[0]["command"] is None
    assert found.refit is not None
    assert found.refit.folder == Path("s/best").resolve()
    html = found._repr_html_()
    assert "<svg" in html
    assert all(str(value) in html for value in found.best_params.values())
    with pytest.raises(ConfigError, match=r"sweep\.params\.model\.depth"):
        trainer.sweep(experiment, {"model.depth": "choice(1,2)"}, out="t")


def flat() -> trainer.data.Splits:
    """784 numbers of which the largest of the first four is the class."""
    parts = [(torch.nn.functional.pad(x, (0, 780)), y) for x, y in DATA]
    return trainer.data.as_splits(parts)


class HalveUnits(StructuralPhase):
    """Keeps the first half of the hidden units."""

    kind = "halve"

    def plan_change(self, model: nn.Module, world: Any) -> dict[str, Any]:
        return {"units": model[0].out_features // 2}  # type: ignore[index, operator]

    @staticmethod
    def apply_change(model: nn.Module, change: dict[str, Any]) -> None:
        units = change["units"]
        first, last = model[0], model[2]  # type: ignore[index]
        new = nn.Linear(4, units), nn.Linear(units, 4)
        with torch.no_grad():
            new[0].weight.copy_(first.weight[:units])
            new[0].bias.copy_(first.bias[:units])
            new[1].weight.copy_(last.weight[:, :units])
            new[1].bias.copy_(last.bias)
        model[0], model[2] = new  # type: ignore[operator]


@pytest.mark.slow
def test_a_structural_change_is_replayed_wherever_the_weights_are_loaded() -> None:
    phases = [Train(epochs=1), HalveUnits(epochs=1), Quantize(epochs=1)]
    undisturbed = run(phases=phases, artifact=True, out="a")
    assert undisturbed.model[0].out_features == 8  # type: ignore[index]
    with pytest.raises(KeyboardInterrupt):
        run(phases=phases, artifact=True, out="b", logger={"stop": StopOnce()})
    resumed = trainer.resume("b", progress=False)
    inputs = DATA[2][0]
    assert torch.equal(undisturbed.model(inputs), resumed.model(inputs))
    with pytest.raises(ConfigError, match=r"changed in structure by .*HalveUnits.*pass that class"):
        trainer.load("a/model.dcz", net())
    loaded = trainer.load("a/model.dcz", net(), phases=[HalveUnits])
    assert torch.equal(loaded(inputs), undisturbed.model(inputs))


def test_ctrl_c_at_the_end_of_a_run_does_not_stop_the_next_run_of_a_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped_before = []

    def execute(*args: Any) -> None:
        requested = args[-1].stop_requested
        stopped_before.append(requested.is_set())
        requested.set()  # as by a signal that arrives too late to end this run

    monkeypatch.setattr("trainer.library.session.execute", execute)
    with trainer.Session(cluster="inline") as session:
        for _ in range(2):
            session.run(model=net, data=DATA, phases=PHASES)
    assert stopped_before == [False, False]


@pytest.mark.integration
@pytest.mark.usefixtures("shared_ray")
def test_a_session_keeps_its_workers_between_runs_and_after_a_failure() -> None:
    class Local(nn.Sequential):
        """A class that no other process can import."""

        def forward(self, x: Tensor) -> Tensor:
            if self[0].out_features == 13:
                raise ArithmeticError("an unlucky number")
            return super().forward(x)

    def local(units: int) -> nn.Module:
        return Local(nn.Linear(4, units), nn.ReLU(), nn.Linear(units, 4))

    def pids(session: trainer.Session) -> list[int]:
        assert session._group is not None
        return [rank.pid for rank in session._group._ranks]  # type: ignore[attr-defined]

    settings = {"data": DATA, "phases": [Train(epochs=1)]}
    with trainer.Session(workers=2, cluster={"max_restarts": 0}, progress=False) as session:
        first = session.run(model=local(8), **settings)
        warm = pids(session)
        second = session.run(model=local(16), **settings)
        assert pids(session) == warm
        with pytest.raises(trainer.RunError, match="an unlucky number"):
            session.run(model=local(13), **settings)
        twice = {**settings, "phases": [Train(epochs=1), Train(epochs=1)]}
        with pytest.raises(trainer.Interrupted):
            session.run(model=local(8), **twice, logger={"stop": StopOnce()})
        third = session.run(model=local(8), **settings)
        assert pids(session) == warm
        assert {first.status, second.status, third.status} == {"done"}
    with pytest.raises(RuntimeError, match="closed"):
        session.run(model=local(8), **settings)


def test_import_is_quick_and_complete() -> None:
    assert set(trainer.__all__) <= set(dir(trainer))
    for name in trainer.__all__:
        assert getattr(trainer, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        trainer.nonsense  # noqa: B018


def test_names_select_what_they_select_on_the_command_line() -> None:
    experiment = trainer.Experiment(
        model=net,
        data=samples(40),
        phases=[Train()],
        task="regression",
        optimizer="adamw",
        cluster="inline",
        logger=["csv", "tensorboard"],
    )
    wanted = ["+experiment=smoke", "task=regression", "optimizer=adamw", "cluster=inline"]
    composed = compose_config([*wanted, "logger=[csv,tensorboard]"]).plain()
    found = experiment.settings()
    for section in ("task", "optimizer", "cluster", "logger"):
        assert found[section] == composed[section]
    assert trainer.Session(cluster="inline").cluster.workers == 1
    assert trainer.Session().cluster.workers == 2
