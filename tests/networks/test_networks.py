"""Networks of torchvision, timm and transformers in all phases, where those are installed.

pip install torchvision timm transformers
python -m pytest tests/networks
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import trainer
from benchmarks.networks import SINGLE, cells, networks
from trainer.phases import Prune

NETWORKS = dict(networks())
CHOSEN = [
    "torchvision ResNet",
    "torchvision GoogLeNet",
    "torchvision MobileNet v3",
    "torchvision DenseNet",
    "torchvision ConvNeXt",
    "torchvision ViT",
    "torchvision Swin",
    "timm EfficientNet",
    "timm ViT",
    "timm Swin",
    "transformers BERT with mask",
    "transformers GPT-2",
    "transformers Llama",
]


def skip_without(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: pip install {' '.join(missing)}")


def run(folder: Path, **settings: Any) -> Any:
    cluster = {"backend": "inline", "workers": 1}
    phases = [Prune(0.5)]
    return trainer.run(phases=phases, cluster=cluster, progress=False, out=folder, **settings)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CHOSEN)
def test_a_network_works_in_all_phases(name: str) -> None:
    skip_without(str(NETWORKS[name].package))
    found = dict(cells(NETWORKS[name], list(SINGLE)))
    assert found == dict.fromkeys(SINGLE, "works")


def test_weights_of_timm_with_a_new_head(tmp_path: Path) -> None:
    skip_without("timm")
    import timm

    saved = timm.create_model("test_resnet").state_dict()
    save_file(saved, tmp_path / "weights.safetensors")
    result = run(
        tmp_path / "run",
        model={"_target_": "timm.create_model", "model_name": "test_resnet", "num_classes": 3},
        data=(torch.randn(10, 3, 32, 32), torch.arange(10) % 3),
        init_from=tmp_path / "weights.safetensors",
        init_skip=["fc.*"],
    )
    assert result.model.fc.out_features == 3
    for name, kept in result.model.state_dict().items():
        if not name.startswith("fc."):  # the rest is pruned
            assert bool(((kept == 0) | (kept == saved[name])).all()), name


def test_a_folder_of_save_pretrained(tmp_path: Path) -> None:
    skip_without("transformers")
    import transformers

    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
    )
    saved = transformers.BertForSequenceClassification(config)
    saved.save_pretrained(tmp_path / "bert")
    ids = torch.randint(1, 50, (10, 6))
    result = run(
        tmp_path / "run",
        model={
            "_target_": "transformers.AutoModelForSequenceClassification.from_pretrained",
            "pretrained_model_name_or_path": str(tmp_path / "bert"),
        },
        data=({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.arange(10) % 3),
    )
    kept, weight = result.model.classifier.weight, saved.classifier.weight
    assert bool(((kept == 0) | (kept == weight)).all())
