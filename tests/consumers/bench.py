"""The example checkpoint, what is made of it, and what vLLM and transformers make of that.

The independent reader is `kernels/plain_decoding.py`: NumPy and the formulas of the formats, nothing of the package.
vLLM runs in an environment of its own (`make .venv-vllm/stamp`; `SHARDMILL_VLLM_PYTHON` names another interpreter).
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoints import read, write
from consumers.cases import AWQ_GROUP, NATIVE, Case
from kernels.plain_decoding import nvfp4_activations
from quantized import AWQ_SECTION, awq, encode_all
from reference.compare_quality import EXAMPLE, ROOT, TEXT, THREADS, WINDOW_TOKENS
from reference.compare_search import Case as ReferenceCase
from reference.compare_search import quantize_with_reference
from shardmill.core.recipe import parse_recipe
from shardmill.example import prepare
from shardmill.stages.pipeline import RunOptions, run
from shardmill.stages.plan import Locations
from shardmill.stages.verify import verify
from zoo.battery import own_weights
from zoo.battery import quantized as quantized_modules

VLLM_PYTHON: Final = Path(os.environ.get("SHARDMILL_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
COMPARED_TOKENS: Final = 128
"""Of the beginning of the text, for which transformers computes every logit in float32."""
_PROGRAM: Final = Path(__file__).with_name("in_vllm.py")
_VLLM_SETTINGS: Final = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": str(THREADS),
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin keep each other from work on a busy machine
    "VLLM_CPU_INT4_W4A8": "0",  # else W4A16 rounds activations to 8 bits, on processors that have AMX
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
Windows = list[list[int]]


@dataclass(frozen=True, slots=True)
class Heard:
    """What a consumer says of the text."""

    log_probabilities: list[list[float]]
    """Of every token but the first of each window."""
    version: str

    @property
    def perplexity(self) -> float:
        """The inverse of the geometric mean of probabilities."""
        return math.exp(-statistics.fmean(itertools.chain.from_iterable(self.log_probabilities)))

    @property
    def tokens(self) -> int:
        """How many are predicted."""
        return sum(map(len, self.log_probabilities))

    def distance(self, other: Heard) -> float:
        """Mean difference of log-probabilities, in nats, of the tokens at the beginning that both have predicted."""
        pairs = zip(self.log_probabilities[0], other.log_probabilities[0], strict=False)
        return statistics.fmean(abs(ours - theirs) for ours, theirs in pairs)


def convert(source: Path, destination: Path, recipe: Mapping[str, Any]) -> Path:
    """Quantize a checkpoint through all stages."""
    locations = Locations(source=str(source), destination=str(destination))
    run(locations, parse_recipe(dict(recipe)), RunOptions(device="cpu", workers=1))
    assert verify(str(destination)) == []
    return destination


def first_layers(source: Path, folder: Path, layers: int) -> Path:
    """A model of the first layers of another."""
    if not folder.exists():
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
        config = json.loads((source / "config.json").read_text())
        kept = {
            name: tensor
            for name, tensor in read(source).items()
            if "layers" not in name or int(name.split(".")[2]) < layers
        }
        write(folder, [kept], config | {"num_hidden_layers": layers})
    return folder


def dense_weights(result: Path) -> dict[str, Tensor]:
    """All tensors of a result with dense BF16 weights, as the independent reader gives them."""
    after = read(result)
    config = json.loads((result / "config.json").read_text())["quantization_config"]
    return own_weights(after, quantized_modules(after), config)


def input_scales(result: Path) -> dict[str, float]:
    """Global scales of activations by module."""
    ending = ".input_global_scale"
    return {name.removesuffix(ending): float(t) for name, t in read(result).items() if name.endswith(ending)}


def dense_copy(result: Path, folder: Path) -> Path:
    """The same as a checkpoint that is not quantized."""
    shutil.copytree(result, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    config = json.loads((result / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.contiguous() for name, tensor in dense_weights(result).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class Rounding:
    """Hooks that round what enters linear layers as the formulas of NVFP4 have it; shares nothing with the package."""

    def __init__(self, model: Any, scales: Mapping[str, float]) -> None:
        self.met: set[str] = set()
        for name, module in model.named_modules():
            if name in scales:
                module.register_forward_pre_hook(partial(self._round, name, scales[name]))

    def _round(self, name: str, scale: float, _module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.met.add(name)
        values, *rest = inputs
        rounded = nvfp4_activations(values.double().numpy(), scale)
        return torch.from_numpy(rounded).to(values.dtype), *rest


def without_activations(result: Path, folder: Path) -> Path:
    """The result as it is, but that its config asks for no quantized activations: the weights alone are compared."""
    folder.mkdir()
    for file in result.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    document = json.loads((result / "config.json").read_text())
    for group in document["quantization_config"]["config_groups"].values():
        group["input_activations"] = None
    (folder / "config.json").write_text(json.dumps(document))
    return folder


@dataclass(frozen=True)
class Bench:
    """A place for results; each is made once."""

    home: Path
    layers: int = 0
    """How many layers of the example are taken, from the first; all if 0."""

    @cached_property
    def source(self) -> Path:
        """The example checkpoint, or its first layers."""
        whole = prepare(EXAMPLE, cache=EXAMPLE.parent / "cache")
        return first_layers(whole, self.home / "first-layers", self.layers) if self.layers else whole

    @cached_property
    def windows(self) -> Windows:
        """The text in tokens."""
        from transformers import AutoTokenizer

        tokens = torch.tensor(AutoTokenizer.from_pretrained(self.source)(TEXT.read_text(encoding="utf-8"))["input_ids"])
        return [window.tolist() for window in tokens.split(WINDOW_TOKENS)]

    @cached_property
    def awq(self) -> tuple[Path, Path]:
        """The example as AWQ stores it, and a dense checkpoint of the values that compressed-tensors reads of that."""
        config = json.loads((self.source / "config.json").read_text())
        stored, plain = encode_all(read(self.source), partial(awq, group=AWQ_GROUP))
        section = {"quantization_config": AWQ_SECTION | {"group_size": AWQ_GROUP}}
        dense = {name: tensor.to(torch.bfloat16) for name, tensor in plain.items()}
        return write(self.home / "awq", [stored], config | section), write(self.home / "awq-dense", [dense], config)

    def whole(self, case: Case) -> Path:
        """What a case begins with, as a dense checkpoint."""
        return self.awq[1] if case.is_awq else self.source

    def result(self, case: Case) -> Path:
        """The example in the format of a case."""
        folder = self.home / case.name.replace(" ", "-")
        if folder.exists():
            return folder
        return convert(self.awq[0] if case.is_awq else self.source, folder, case.recipe)

    def of_reference(self, case: Case) -> Path:
        """What llm-compressor makes of the example in the format of a case.

        Raises:
            RuntimeError: it fails.
        """
        folder = self.home / "reference" / case.name.replace(" ", "-")
        job = folder, ReferenceCase(case.recipe["scheme"], case.recipe.get("group_size")), ""
        error, _ = quantize_with_reference([job], self.source)[folder]
        if error:
            raise RuntimeError(f"llm-compressor, {case.name}: {error}")
        return folder

    def in_vllm(self, checkpoint: Path, kernels: str = NATIVE) -> Heard:
        """Let vLLM load a checkpoint and read the text."""
        request = {
            "checkpoint": str(checkpoint),
            "windows": self.windows,
            "test_kernels": kernels != NATIVE,
        }
        done = subprocess.run(
            [VLLM_PYTHON, _PROGRAM],
            check=False,
            capture_output=True,
            text=True,
            input=json.dumps(request),
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | _VLLM_SETTINGS,
        )
        if done.returncode:
            raise RuntimeError(f"{VLLM_PYTHON} ended with {done.returncode}: {(done.stderr or done.stdout)[-4000:]}")
        answer = json.loads(done.stdout.splitlines()[-1])
        return Heard(answer["log_probabilities"], answer["version"])

    def in_transformers(self, checkpoint: Path, scales: Mapping[str, float] = MappingProxyType({})) -> Tensor:
        """Logits of `COMPARED_TOKENS`, computed in float32; weights are BF16, as most formats are given back.

        Args:
            scales: global scales of the activations that are rounded to 4 bits, by module.
        """
        import transformers

        torch.set_num_threads(THREADS)
        loader: Any = transformers.AutoModelForCausalLM
        model, info = loader.from_pretrained(checkpoint, dtype=torch.bfloat16, output_loading_info=True)
        assert not info["missing_keys"], sorted(info["missing_keys"])[:5]
        with torch.no_grad():
            model.eval()(input_ids=torch.tensor([[5, 6, 7, 8]]))  # compressed weights are given back when first needed
            torch.nn.Module.float(model)
            rounding = Rounding(model, scales)
            logits: Tensor = model(input_ids=torch.tensor([self.windows[0][:COMPARED_TOKENS]])).logits[0]
        assert logits.isfinite().all()
        assert rounding.met == set(scales)
        return logits

    def heard(self, logits: Tensor) -> Heard:
        """What logits of transformers say of the text."""
        following = torch.tensor(self.windows[0][1:COMPARED_TOKENS])
        chosen = torch.log_softmax(logits[:-1], -1).gather(1, following[:, None])
        return Heard([chosen[:, 0].tolist()], version("transformers"))
