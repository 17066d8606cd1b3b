"""Checkpoints that a stranger might send, each written anew: what is wrong with it, and what has to happen.

reject   one refusal that lists the defect, before any shard is worked on; nothing is left behind
accept   converted, without a warning; every tensor is there
policy   converted, with a warning on stderr and in the manifest
"""

from __future__ import annotations

import json
import math
import os
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Final

WIDTH: Final = 64
INDEX: Final = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
UP: Final = "model.layers.1.mlp.up_proj.weight"
CANARY: Final = "canary-5f2c-that-must-never-be-copied"
CONFIG: Final[Mapping[str, Any]] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "vocab_size": 32,
}
BITS: Final = {"BF16": 16, "F16": 16, "F32": 32, "F64": 64, "I64": 64, "U8": 8, "BOOL": 8, "F8_E8M0": 8, "C64": 64}


@dataclass(slots=True)
class Tensor:
    """Dtype, shape and bytes."""

    dtype: str
    shape: list[Any]
    data: bytes


@cache
def _values(count: int, seed: int) -> bytes:
    rng = Random(seed)  # noqa: S311
    some = [struct.unpack("<I", struct.pack("<f", rng.gauss(0, 0.02)))[0] >> 16 for _ in range(min(count, 509))]
    return (struct.pack(f"<{len(some)}H", *some) * (count // len(some) + 1))[: 2 * count]


def matrix(rows: int = WIDTH, cols: int = WIDTH, seed: int = 1) -> Tensor:
    """BF16 values that are about Gaussian."""
    return Tensor("BF16", [rows, cols], _values(rows * cols, seed))


def zeros(dtype: str, *shape: int, bits: int = 0) -> Tensor:
    """A tensor of zero bytes."""
    return Tensor(dtype, list(shape), bytes(math.prod(shape) * (bits or BITS[dtype]) // 8))


def layer(number: int) -> dict[str, Tensor]:
    """One decoder layer."""
    leaves = [*(f"self_attn.{leaf}_proj" for leaf in "qkvo"), *(f"mlp.{leaf}_proj" for leaf in ("gate", "up", "down"))]
    prefix = f"model.layers.{number}."
    found = {f"{prefix}{leaf}.weight": matrix(seed=10 * number + n) for n, leaf in enumerate(leaves)}
    return found | {f"{prefix}input_layernorm.weight": zeros("BF16", WIDTH)}


def sound() -> dict[str, dict[str, Tensor]]:
    """The checkpoint that every case starts from."""
    first = {"model.embed_tokens.weight": matrix(32)} | layer(0)
    second = layer(1) | {"model.norm.weight": zeros("BF16", WIDTH), "lm_head.weight": matrix(32)}
    return {ONE: first, TWO: second}


def header(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The head of a shard."""
    found: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + len(tensor.data)
        found[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
    return found


def body(tensors: Mapping[str, Tensor]) -> bytes:
    """The data section of a shard."""
    return b"".join(tensor.data for tensor in tensors.values())


def put(path: Path, content: bytes | str | Any) -> None:
    """Write a file; what is neither bytes nor text becomes JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, bytes | str) else json.dumps(content)
    path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)


def put_shard(path: Path, head: Any, data: bytes, *, length: int | None = None, pad: bool = True) -> None:
    """Write a shard from any header."""
    text = head if isinstance(head, bytes) else (head if isinstance(head, str) else json.dumps(head)).encode()
    text += b" " * (-len(text) % 8 if pad else 0)
    put(path, struct.pack("<Q", len(text) if length is None else length) + text + data)


def put_checkpoint(root: Path, shards: Mapping[str, Mapping[str, Tensor]], config: Any = CONFIG) -> None:
    """Write a whole checkpoint."""
    for name, tensors in shards.items():
        put_shard(root / name, header(tensors), body(tensors))
    put(root / INDEX, {"weight_map": {tensor: name for name, tensors in shards.items() for tensor in tensors}})
    put(root / "config.json", config)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One checkpoint."""

    name: str
    expect: str
    tries: str
    build: Callable[[Path, Path], object]
    """Gets the folder of a sound checkpoint, and one outside."""
    says: tuple[str, ...] = ()
    """What the refusal or the warning has to say."""
    scheme: str = "FP8_DYNAMIC"
    options: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    """Files that the result must not hold."""
    present: tuple[str, ...] = ()
    is_late: bool = False
    """Whether the defect lies in values, which are read when shards are worked on."""


CASES: Final[dict[str, Case]] = {}


def add(name: str, expect: str, tries: str, build: Callable[[Path, Path], object], *says: str, **more: Any) -> None:
    """Register a case."""
    assert name not in CASES, name
    CASES[name] = Case(name=name, expect=expect, tries=tries, build=build, says=says, **more)


# ---- headers ----------------------------------------------------------------------------------------------------


def _header(name: str, tries: str, change: Callable[[dict[str, Any]], Any], *says: str, **more: Any) -> None:
    """The second shard with another header."""

    def build(root: Path, _outside: Path) -> None:
        tensors = sound()[TWO]
        head = header(tensors)
        changed = change(head)
        put_shard(root / TWO, head if changed is None else changed, body(tensors))

    add(f"header_{name}", more.pop("expect", "reject"), tries, build, TWO, *says, **more)


def _entry(**fields: Any) -> Callable[[dict[str, Any]], None]:
    def change(head: dict[str, Any]) -> None:
        head[UP].update(fields)

    return change


def _rename(new: str) -> Callable[[dict[str, Any]], None]:
    def change(head: dict[str, Any]) -> None:
        head[new] = head.pop(UP)

    return change


def _twice(head: dict[str, Any]) -> str:
    return json.dumps(head)[:-1] + f', "{UP}": {json.dumps(head[UP])}}}'


def _shifted(by: int) -> Callable[[dict[str, Any]], None]:
    def change(head: dict[str, Any]) -> None:
        begin, end = head[UP]["data_offsets"]
        head[UP]["data_offsets"] = [begin + by, end + by]

    return change


_header("not_json", "text instead of JSON", lambda _: "{]", "not valid JSON")
_header("array", "a list instead of an object", lambda _: "[1]", "start with")
_header("leading_space", "a space before the object", lambda h: " " + json.dumps(h), "start with")
_header("bom", "a byte order mark before the object", lambda h: "\ufeff" + json.dumps(h), "start with")
_header("utf16", "another encoding", lambda h: json.dumps(h).encode("utf-16-le"), "")
_header("not_utf8", "bytes that are no text", lambda h: json.dumps(h).encode().replace(b"up_proj", b"up\xff\xfeproj"))
_header("deep", "100,000 lists in one another", lambda _: '{"a":' + "[" * 100_000, "json_depth")
_header("key_twice", "a tensor that stands twice", _twice, "twice")
_header(
    "field_twice", "a dtype that stands twice", lambda h: json.dumps(h).replace('{"dtype"', '{"dtype":"U8","dtype"', 1)
)
_header("metadata_twice", "metadata that stand twice", lambda h: '{"__metadata__":{},' + json.dumps(h)[1:], "twice")
_header("metadata_nested", "metadata that are no text", lambda h: h.update(__metadata__={"a": {"b": "c"}}), "metadata")
_header("metadata_list", "metadata that are a list", lambda h: h.update(__metadata__=["a"]), "metadata")
_header("entry_list", "an entry that is a list", lambda h: h.update({UP: [1, 2]}), UP, "exactly dtype")
_header("entry_null", "an entry that is null", lambda h: h.update({UP: None}), UP)
_header("field_missing", "an entry without shape", lambda h: h[UP].pop("shape") and None, UP)
_header("field_extra", "an entry with strides", _entry(strides=[1]), UP)
_header("dtype_unknown", "a dtype that nobody knows", _entry(dtype="Q4_K"), UP, "unknown dtype")
_header("dtype_number", "a dtype that is a number", _entry(dtype=16), UP, "unknown dtype")
_header("dtype_long", "a dtype of 50,000 letters", _entry(dtype="F" * 50_000), UP)
_header("shape_float", "a shape of floats", _entry(shape=[64.0, 64]), UP, "shape")
_header("shape_bool", "a shape of booleans", _entry(shape=[True, 4096]), UP, "shape")
_header("shape_text", "a shape that is a text", _entry(shape="64x64"), UP, "shape")
_header("shape_null", "a shape that is null", _entry(shape=None), UP, "shape")
_header("shape_negative", "a negative extent", _entry(shape=[-64, -64]), UP, "shape")
_header("shape_wraps", "a product that wraps around 2**64", _entry(shape=[2**32, 2**32, 4096]), UP, "takes")
_header("shape_huge", "an extent of 2**63", _entry(shape=[2**63, 0]), UP, "shape")
_header("shape_lies", "a shape that is larger than the data", _entry(shape=[64, 65]), UP, "takes")
_header("rank", "nine dimensions", _entry(shape=[64, 64, *[1] * 7]), UP, "`rank` is 8")
_header("digits", "an integer of 10,000 digits", lambda h: json.dumps(h).replace("8192", "9" * 10_000), "json_digits")
_header("float_huge", "a number that no float holds", lambda h: json.dumps(h).replace("8192", "1e999"), "")
_header("nan", "NaN as an offset", lambda h: json.dumps(h).replace("8192", "NaN"), "NaN")
_header("offsets_three", "three offsets", _entry(data_offsets=[0, 1, 2]), UP, "data_offsets")
_header("offsets_negative", "negative offsets", _entry(data_offsets=[-8192, 0]), UP, "data_offsets")
_header("offsets_swapped", "an end before its begin", _entry(data_offsets=[8192, 0]), UP, "span")
_header("offsets_past_end", "offsets behind the end of the file", _shifted(10**9), "expected")
_header("overlap", "two tensors over the same bytes", _shifted(-16), "overlap")
_header("hole", "bytes that belong to no tensor", _shifted(16), UP)
_header("name_empty", "a tensor without a name", _rename(""), "empty name")
_header("name_control", "terminal escapes in a name", _rename("a\x1b[2Jb.weight"), "control")
_header("name_bidi", "a name that is shown backwards", _rename("a\u202eb.weight"), "invisible")
_header("name_surrogate", "half a character in a name", _rename("a\ud800.weight"))
_header("name_long", "a name of 5,000 bytes", _rename("n" * 5000), "`name_bytes` is 4096")
_header("f4_odd", "half a byte too much", _entry(dtype="F4", shape=[16383], data_offsets=[0, 8192]), UP, "takes None")
_header("lists", "two million lists", lambda _: '{"a":[' + "[]," * 2_000_000 + "[]]}", "header_tensors")
_header("objects", "half a million objects", lambda _: "{" + '"a":{"":0},' * 700_000 + '"b":0}', "header_tensors")
_header(
    "collision",
    "a tensor with the name of a scale to come",
    _rename(UP.replace("up_proj.weight", "down_proj.weight_scale")),
    "down_proj",
)
_header(
    "metadata_long",
    "1 MB of escapes in the metadata",
    lambda h: h.update(__metadata__={"x": "\x1b[2J" * 200_000}),
    "metadata_bytes",
    expect="policy",
)
_header("whitespace", "line breaks and tabs between the tokens", lambda h: json.dumps(h, indent="\t"), expect="accept")
_header(
    "escapes", "names written in escapes", lambda h: json.dumps(h).replace("up_proj", "\\u0075p_proj"), expect="accept"
)
_header("no_metadata", "no metadata", lambda h: h.pop("__metadata__") and None, expect="accept")
_header(
    "reversed",
    "tensors in another order than their data",
    lambda h: json.dumps(dict(reversed(h.items()))),
    expect="accept",
)


def _raw(name: str, tries: str, content: bytes, *says: str) -> None:
    add(f"shard_{name}", "reject", tries, lambda root, _: put(root / TWO, content), TWO, *says)


_raw("empty", "a shard of no bytes", b"")
_raw("three_bytes", "a shard of three bytes", b"abc")
_raw("length_zero", "a header of no bytes", bytes(64))
_raw("length_one", "a header of one byte", b"\1" + bytes(64))
_raw("length_huge", "a header length of 2**63", struct.pack("<Q", 2**63) + b"{}")
_raw("pointer", "a pointer of git-lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
_raw("pickle", "a pickle under the name of a shard", b"\x80\x04cos\nsystem\n(S'true'\ntR.")
_raw("zip", "a zip under the name of a shard", b"PK\x03\x04" + bytes(100))


def _long_header(root: Path, _outside: Path) -> None:
    with (root / TWO).open("wb") as file:
        file.write(struct.pack("<Q", 20_000_000) + b"{")
        file.truncate(20_000_008)


def _cut(root: Path, _outside: Path) -> None:
    os.truncate(root / TWO, (root / TWO).stat().st_size - 1)


def _append(root: Path, _outside: Path) -> None:
    (root / TWO).write_bytes((root / TWO).read_bytes() + b"\0")


add("shard_header_20MB", "reject", "a header of 20 MB", _long_header, TWO, "`header_bytes` is 16000000")
add("shard_cut", "reject", "a shard that lacks its last byte", _cut, TWO, "fetch the file again")
add("shard_longer", "reject", "a byte behind the last tensor", _append, TWO, "expected")
add(
    "shard_count",
    "reject",
    "more tensors than allowed",
    lambda _r, _o: None,
    ONE,
    "`header_tensors` is 5",
    options=("--limit", "header_tensors=5"),
)
add(
    "shard_experts",
    "reject",
    "a stack of 10**12 experts without elements",
    lambda r, _: put_checkpoint(
        r, sound() | {TWO: sound()[TWO] | {"model.layers.1.mlp.experts.down_proj": Tensor("BF16", [10**12, 0, 0], b"")}}
    ),
    TWO,
    "`stack_experts` is 10000",
)


# ---- index ------------------------------------------------------------------------------------------------------


def _index(name: str, tries: str, change: Callable[[dict[str, Any]], Any], *says: str, **more: Any) -> None:
    def build(root: Path, _outside: Path) -> None:
        document = json.loads((root / INDEX).read_text())
        changed = change(document)
        put(root / INDEX, document if changed is None else changed)

    add(f"index_{name}", more.pop("expect", "reject"), tries, build, INDEX, *says, **more)


def _maps_to(value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document["weight_map"][UP] = value

    return change


for _name, _value in {
    "parent": "../outside/x.safetensors",
    "parent_inside": "a/../../outside/x.safetensors",
    "absolute": "/etc/x.safetensors",
    "drive": "C:\\x.safetensors",
    "backslash": "..\\outside\\x.safetensors",
    "percent": "%2e%2e/outside/x.safetensors",
    "zero_byte": "a\0.safetensors",
    "line_break": "a\n.safetensors",
    "bidi": "a\u202e.safetensors",
    "dot": "./x.safetensors",
    "hidden": ".git/x.safetensors",
    "url": "s3://other/x.safetensors",
    "home": "~/x.safetensors",
    "deep": "a/b/c/d/e.safetensors",
    "long": "a" * 300 + ".safetensors",
    "config": "config.json",
    "folder": "",
    "space": "x y.safetensors",
    "option": "-rf.safetensors",
}.items():
    _index(f"path_{_name}", f"a shard name of the kind `{_name}`", _maps_to(_value), UP, "plain relative path")
_index("value_number", "a number as shard", _maps_to(3), UP)
_index("value_null", "null as shard", _maps_to(None), UP)
_index("value_list", "a list as shard", _maps_to([TWO]), UP)
_index("not_json", "half an index", lambda d: json.dumps(d)[:-20])
_index("array", "a list instead of an object", lambda _: [])
_index("no_map", "no weight_map", lambda d: d.pop("weight_map") and None)
_index("map_empty", "an empty weight_map", lambda _: {"weight_map": {}})
_index("map_list", "a weight_map that is a list", lambda _: {"weight_map": [TWO]})
_index("map_twice", "two weight_maps", lambda d: json.dumps(d)[:-1] + ',"weight_map":{"a":"b.safetensors"}}', "twice")
_index("key_twice", "a tensor twice", lambda d: json.dumps(d).replace(f'"{UP}"', f'"{UP}":"{ONE}","{UP}"'), "twice")
_index("deep", "100,000 lists in one another", lambda _: '{"weight_map":' + "[" * 100_000, "json_depth")
_index("nan", "NaN as size", lambda d: json.dumps(d)[:-1] + ',"metadata":{"total_size":NaN}}', "NaN")
_index("digits", "a size of 5,000 digits", lambda d: json.dumps(d)[:-1] + f',"x":{"9" * 5000}}}', "json_digits")
_index("bom", "a byte order mark", lambda d: "\ufeff" + json.dumps(d), "byte order mark")
_index(
    "name_long", "a key of 100,000 letters", lambda d: d["weight_map"].update({"k" * 100_000: TWO}), "json_string_bytes"
)
_index(
    "too_many",
    "more tensors than allowed",
    lambda d: d["weight_map"].update({f"t{n}": TWO for n in range(3000)}),
    "`index_tensors` is 100",
    options=("--limit", "index_tensors=100"),
)
_index(
    "shards", "more shards than allowed", lambda _: None, "`index_shards` is 1", options=("--limit", "index_shards=1")
)
_index("size_lies", "a total size that is far off", lambda d: d.update(metadata={"total_size": 1}), expect="accept")


def _disagree(change: Callable[[dict[str, str]], Any]) -> Callable[[Path, Path], None]:
    def build(root: Path, _outside: Path) -> None:
        document = json.loads((root / INDEX).read_text())
        change(document["weight_map"])
        put(root / INDEX, document)

    return build


add("index_ghost", "reject", "a tensor that no shard has", _disagree(lambda m: m.update(ghost=TWO)), TWO, "ghost")
add("index_elsewhere", "reject", "a tensor in another shard", _disagree(lambda m: m.update({UP: ONE})), UP)
add("index_no_shard", "reject", "a shard that is not there", lambda r, _: (r / TWO).unlink(), TWO, "missing")
add("index_unnamed", "policy", "a tensor that the index leaves out", _disagree(lambda m: m.pop(UP)), UP)
add(
    "index_other",
    "policy",
    "a second index",
    lambda r, _: put(r / "x.safetensors.index.json", {"weight_map": {}}),
    "x.safetensors.index.json",
    absent=("x.safetensors.index.json",),
)


# ---- config -----------------------------------------------------------------------------------------------------


def _config(name: str, tries: str, content: Any, *says: str, **more: Any) -> None:
    add(
        f"config_{name}",
        more.pop("expect", "reject"),
        tries,
        lambda r, _: put(r / "config.json", content),
        "config.json",
        *says,
        **more,
    )


_TEXT: Final = json.dumps(CONFIG)
_config("not_json", "half a config", "{")
_config("empty", "a config of no bytes", b"")
_config("array", "a list instead of an object", [])
_config("number", "a number instead of an object", "7")
_config("key_twice", "a key twice", _TEXT[:-1] + ',"vocab_size": 7}', "twice")
_config("key_twice_below", "a key twice, one level down", _TEXT[:-1] + ',"a":{"b":1,"b":2}}', "twice")
_config("nan", "NaN", _TEXT[:-1] + ',"a": NaN}', "NaN")
_config("infinity", "Infinity", _TEXT[:-1] + ',"a": -Infinity}', "Infinity")
_config("float_huge", "a number that no float holds", _TEXT[:-1] + ',"a": 1e999}', "float")
_config("digits", "an integer of 10,000 digits", _TEXT[:-1] + f',"a": {"9" * 10_000}}}', "json_digits")
_config("deep", "100,000 objects in one another", _TEXT[:-1] + ',"a":' + '{"a":' * 100_000, "json_depth")
_config("bom", "a byte order mark", "\ufeff" + _TEXT, "byte order mark")
_config("utf16", "another encoding", _TEXT.encode("utf-16"))
_config("surrogate", "half a character", _TEXT[:-1] + ',"a": "\\ud800"}')
_config("large", "a config of 5 MB", _TEXT + " " * 5_000_000, "`json_bytes` is 4000000")
_config("text_long", "a text of 100,000 letters", {**CONFIG, "a": "x" * 100_000}, "json_string_bytes")
_config("quantized", "a config of a quantized checkpoint", {**CONFIG, "quantization_config": {"quant_method": "gptq"}})
_config("quantized_text", "a quantization_config that is a text", {**CONFIG, "quantization_config": "x"})
_config(
    "quantized_below",
    "a quantization_config three levels down",
    {**CONFIG, "a": {"b": [{"quantization_config": {"ignore": ["re:(.*a)*$"]}}]}},
)
_config(
    "pair", "a character outside the first plane, in escapes", _TEXT[:-1] + ',"a": "\\ud83d\\ude00"}', expect="accept"
)
_config(
    "auto_map",
    "references to code",
    {**CONFIG, "auto_map": {"AutoModel": "evil/repo--x.Y"}},
    "auto_map",
    expect="policy",
)
_config(
    "auto_map_below",
    "references to code, two levels down",
    {**CONFIG, "a": {"b": [{"auto_map": {}}]}},
    "auto_map",
    expect="policy",
)


def _config_folder(root: Path, _outside: Path) -> None:
    (root / "config.json").unlink()
    put(root / "config.json/x", "")


add("config_missing", "reject", "no config", lambda r, _: (r / "config.json").unlink(), "config.json", "missing")
add(
    "config_folder",
    "reject",
    "a folder called config.json",
    _config_folder,
    "config.json",
)


# ---- what lies beside -------------------------------------------------------------------------------------------


def _swap(name: str, make: Callable[[Path, Path], object]) -> Callable[[Path, Path], None]:
    def build(root: Path, outside: Path) -> None:
        (root / name).unlink(missing_ok=True)
        make(root / name, outside)

    return build


def _secret(path: Path, outside: Path) -> None:
    put(outside / "secret", CANARY)
    path.symlink_to(outside / "secret")


def _socket(path: Path, _outside: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        here = Path.cwd()
        os.chdir(path.parent)  # the name of a socket is short
        try:
            bound.bind(path.name)
        finally:
            os.chdir(here)


def _moved_out(root: Path, outside: Path) -> None:
    (root / TWO).rename(outside / "blob")
    (root / TWO).symlink_to("../outside/blob")


def _moved_folder(root: Path, outside: Path) -> None:
    put(outside / "sub/secret.txt", CANARY)
    (root / "assets").symlink_to(outside / "sub")


def _inner_link(root: Path, _outside: Path) -> None:
    (root / TWO).rename(root / "shard.data")
    (root / TWO).symlink_to("shard.data")


def _loop(root: Path, _outside: Path) -> None:
    (root / "again").symlink_to(".")


def _link_chain(root: Path, outside: Path) -> None:
    (root / "parent").symlink_to("..")
    (root / TWO).rename(outside / "blob")
    (root / TWO).symlink_to("parent/outside/blob")


add("file_fifo_shard", "reject", "a pipe as a shard", _swap(TWO, lambda p, _: os.mkfifo(p)), TWO, "regular")
add("file_fifo_config", "reject", "a pipe as config", _swap("config.json", lambda p, _: os.mkfifo(p)), "config.json")
add("file_fifo_index", "reject", "a pipe as index", _swap(INDEX, lambda p, _: os.mkfifo(p)), INDEX)
add("file_socket", "reject", "a socket as a shard", _swap(TWO, _socket), TWO)
add(
    "file_device_config",
    "reject",
    "a link to an endless device",
    _swap("config.json", lambda p, _: p.symlink_to("/dev/zero")),
    "config.json",
)
add(
    "file_device_shard",
    "reject",
    "a link to an endless device as a shard",
    _swap(TWO, lambda p, _: p.symlink_to("/dev/zero")),
    TWO,
)
add(
    "file_proc",
    "reject",
    "a link to the environment of the process",
    _swap("tokenizer.json", lambda p, _: p.symlink_to("/proc/self/environ")),
    "tokenizer.json",
    "out of the checkpoint",
)
add(
    "file_secret",
    "reject",
    "a link to a secret",
    _swap("tokenizer.json", _secret),
    "tokenizer.json",
    "out of the checkpoint",
)
add("file_shard_outside", "reject", "a link to a shard elsewhere", _moved_out, TWO, "out of the checkpoint")
add("file_link_chain", "reject", "a link that leads out through another", _link_chain, "parent")
add("file_folder_outside", "reject", "a link to a folder elsewhere", _moved_folder, "assets", "link")
add("file_folder_shard", "reject", "a folder as a shard", _swap(TWO, lambda p, _: p.mkdir()), TWO)
add("file_self_link", "reject", "a shard that is a link to itself", _swap(TWO, lambda p, _: p.symlink_to(p.name)), TWO)
add(
    "file_dangling",
    "reject",
    "a config that leads nowhere",
    _swap("config.json", lambda p, _: p.symlink_to("x")),
    "config.json",
)
add("file_inner_link", "policy", "a link to a file beside it", _inner_link, "shard.data")
add("file_loop", "policy", "a folder that holds itself", _loop, "again", "link")
add(
    "file_spare_secret",
    "policy",
    "a link to a secret that nobody needs",
    _swap("notes.txt", _secret),
    "notes.txt",
    absent=("notes.txt",),
)
add(
    "file_spare_fifo",
    "policy",
    "a pipe that nobody needs",
    _swap("notes.txt", lambda p, _: os.mkfifo(p)),
    "notes.txt",
    absent=("notes.txt",),
)


def _beside(name: str, expect: str, tries: str, files: Mapping[str, Any], *says: str, **more: Any) -> None:
    def build(root: Path, _outside: Path) -> None:
        for path, content in files.items():
            put(root / path, content)

    add(f"beside_{name}", expect, tries, build, *says, **more)


_beside(
    "code",
    "policy",
    "Python files",
    {"modeling_x.py": "raise SystemExit", "setup.py": ""},
    "modeling_x.py",
    "setup.py",
    absent=("modeling_x.py", "setup.py"),
)
_beside(
    "pickle",
    "policy",
    "pickles",
    {"pytorch_model.bin": b"\x80\x04.", "a.pt": b""},
    "pytorch_model.bin",
    absent=("pytorch_model.bin", "a.pt"),
)
_beside("hidden", "policy", "a file with a secret", {".env": CANARY}, ".env", absent=(".env",))
_beside("git", "policy", "a repository", {".git/config": CANARY}, ".git/", absent=(".git/config",))
_beside("library", "policy", "a shared library", {"kernel.so": b"\x7fELF"}, "kernel.so", absent=("kernel.so",))
_beside(
    "allowed",
    "policy",
    "code that is asked for",
    {"modeling_x.py": "x = 1"},
    "copied on demand",
    options=("--allow-code",),
    present=("modeling_x.py",),
)
_beside(
    "tokenizer_code",
    "policy",
    "references to code beside the tokenizer",
    {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["x.Y", None]}, "a": 1}},
    "tokenizer_config.json",
    present=("tokenizer_config.json",),
)
_beside(
    "consolidated",
    "policy",
    "the weights a second time",
    {"consolidated.safetensors": b"", "adapter_model.safetensors": b""},
    "adapter_model.safetensors",
    "consolidated.safetensors",
    absent=("consolidated.safetensors",),
)
_beside(
    "template",
    "accept",
    "a chat template that would run code",
    {"chat_template.jinja": "{{ ''.__class__.__mro__ }}"},
    present=("chat_template.jinja",),
)
_beside(
    "folders",
    "accept",
    "tokenizers of the parts of a pipeline",
    {"text_encoder/tokenizer.json": "{}"},
    present=("text_encoder/tokenizer.json",),
)
_beside(
    "tokenizer_bad",
    "reject",
    "a tokenizer config that is no JSON",
    {"tokenizer_config.json": "{"},
    "tokenizer_config.json",
)


# ---- tensors ----------------------------------------------------------------------------------------------------


def _tensors(
    name: str,
    expect: str,
    tries: str,
    tensors: Mapping[str, Tensor],
    *says: str,
    gone: tuple[str, ...] = (),
    **more: Any,
) -> None:
    def build(root: Path, _outside: Path) -> None:
        shards = sound()
        shards[TWO].update(tensors)
        for lost in gone:
            del shards[TWO][lost]
        put_checkpoint(root, shards)

    add(f"tensor_{name}", expect, tries, build, *says, **more)


_SIX: Final = {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "F8_E8M0": 8, "C64": 64, "BOOL": 8, "I64": 64, "U8": 8}
for _dtype, _bits in _SIX.items():
    _tensors(
        f"copied_{_dtype}",
        "policy",
        f"a tensor of dtype {_dtype}",
        {"x.blocks": zeros(_dtype, 8, 8, bits=_bits)},
        "x.blocks",
        _dtype,
    )
_tensors(
    "empty",
    "policy",
    "tensors without elements",
    {f"z.{n}.bias": Tensor("BF16", [0], b"") for n in range(300)},
    "no elements",
)
_tensors(
    "codes",
    "reject",
    "8-bit codes where a weight is expected",
    {UP: Tensor("F8_E4M3", [64, 64], bytes(4096))},
    UP,
    "already",
)
_tensors("scalar", "accept", "scalars", {"logit_scale": Tensor("F32", [], bytes(4)), "a.b": zeros("BF16", 1)})
_tensors("rank_five", "accept", "five dimensions", {"patch.kernel": zeros("BF16", 2, 3, 2, 2, 2)})
_tensors("rank_eight", "accept", "eight dimensions", {"x.kernel": zeros("BF16", 1, 2, 1, 2, 1, 2, 1, 2)})
_tensors("upward_name", "accept", "a name that looks like a path", {"../../x.bias": zeros("BF16", 4)})
_tensors(
    "partner",
    "policy",
    "q without k and v",
    {},
    "self_attn",
    "fuse",
    gone=tuple(f"model.layers.1.self_attn.{leaf}_proj.weight" for leaf in "kv"),
    scheme="NVFP4A16",
)
_tensors(
    "outlier",
    "policy",
    "one value of 3e38",
    {UP: Tensor("BF16", [64, 64], b"\x7f\x7f" + matrix().data[2:])},
    "up_proj",
    "outweighs",
)
_tensors("nan", "reject", "one NaN", {UP: Tensor("BF16", [64, 64], b"\xc0\x7f" + matrix().data[2:])}, UP, is_late=True)
_tensors(
    "blocks", "policy", "a weight that blocks do not tile", {UP: matrix(64, 48)}, "partial blocks", scheme="FP8_BLOCK"
)
_tensors("group", "reject", "a width that no group divides", {UP: matrix(64, 40)}, UP, scheme="NVFP4A16")
_tensors("f16", "accept", "F16 values", {UP: Tensor("F16", [64, 64], struct.pack("<4096e", *[0.5, -0.25] * 2048))})
_tensors("f64", "accept", "F64 values", {UP: Tensor("F64", [64, 64], struct.pack("<4096d", *[0.5, -0.25] * 2048))})
_tensors("zeros", "accept", "a weight of zeros", {UP: zeros("BF16", 64, 64)})


# ---- layouts ----------------------------------------------------------------------------------------------------


def _single(root: Path, _outside: Path) -> None:
    for path in root.iterdir():
        path.unlink()
    tensors = {name: tensor for shard in sound().values() for name, tensor in shard.items()}
    put_shard(root / "model.safetensors", header(tensors), body(tensors))
    put(root / "config.json", CONFIG)


def _renamed(*stems: str) -> Callable[[Path, Path], None]:
    def build(root: Path, _outside: Path) -> None:
        index = (root / INDEX).read_bytes()
        (root / INDEX).unlink()
        for stem in stems:
            put(root / f"{stem}.safetensors.index.json", index)

    return build


def _folders(root: Path, _outside: Path) -> None:
    for path in root.iterdir():
        path.unlink()
    put_checkpoint(root, {f"weights/{name}": tensors for name, tensors in sound().items()})


def _unpadded(root: Path, _outside: Path) -> None:
    tensors = sound()[TWO]
    text = json.dumps(header(tensors))
    put_shard(root / TWO, text + " " * (3 - len(text) % 8), body(tensors), pad=False)


add("layout_sound", "accept", "nothing is wrong", lambda _r, _o: None)
add("layout_single", "accept", "one file and no index", _single)
add("layout_other_name", "accept", "an index of another name and no other", _renamed("x"))
add("layout_two_names", "reject", "two indexes of other names", _renamed("x", "y"), "2 indexes")
add("layout_folders", "accept", "shards in a folder below", _folders)
add("layout_unpadded", "accept", "a header whose length is odd", _unpadded)
add(
    "layout_no_index",
    "reject",
    "two shards and no index",
    lambda r, _: (r / INDEX).unlink(),
    "found 2 safetensors files",
)
add(
    "layout_same_name",
    "reject",
    "one tensor in two shards",
    lambda r, _: put_checkpoint(r, sound() | {TWO: sound()[TWO] | {"model.layers.0.mlp.up_proj.weight": matrix()}}),
    "model.layers.0.mlp.up_proj.weight",
)


def build(case: Case, root: Path) -> Path:
    """Write a case below a folder; returns the checkpoint."""
    source, outside = root / "source", root / "outside"
    outside.mkdir(parents=True)
    put(outside / "x.safetensors", CANARY)
    put_checkpoint(source, sound())
    case.build(source, outside)
    return source


def table() -> str:
    """All cases as rows of a table."""
    rows = [f"| `{case.name}` | {case.expect} | {case.tries} |" for case in CASES.values()]
    return "\n".join(["| case | expected | what it tries |", "| --- | --- | --- |", *rows])
