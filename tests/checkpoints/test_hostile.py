"""Hostile files: each is refused in one line, before memory of the size that it claims is allocated."""

from __future__ import annotations

import collections
import json
import re
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import published_files
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from hybridzoo import checkpoints
from hybridzoo.checkpoints import reading
from hybridzoo.checkpoints.reading import CheckpointError, read_checkpoint, read_state_dict, wrong_numbers

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(path: str | Path, reason: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^checkpoint {path}: .*{reason}") as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


# Zip archives that two programs read differently ------------------------------------------------------------------


def whole() -> bytes:
    torch.save(STATE, "whole.pth")
    return Path("whole.pth").read_bytes()


def rezipped(change: Callable[[zipfile.ZipFile, str, bytes], None], extra: Callable[[zipfile.ZipFile], None]) -> bytes:
    whole()
    with zipfile.ZipFile("whole.pth") as good, zipfile.ZipFile("made.pth", "w") as made:
        for name in good.namelist():
            change(made, name, good.read(name))
        extra(made)
    return Path("made.pth").read_bytes()


def copy(made: zipfile.ZipFile, name: str, content: bytes) -> None:
    made.writestr(name, content)


def with_record(name: str) -> Callable[[], bytes]:
    return lambda: rezipped(copy, lambda made: made.writestr(name, b"other"))


def with_directory(offset: int, form: str, value: int) -> bytes:
    """The archive with one number of its last directory entry changed."""
    found = bytearray(whole())
    struct.pack_into(form, found, found.rindex(b"PK\x01\x02") + offset, value)
    return bytes(found)


def flipped(at: bytes, offset: int = 0) -> bytes:
    found = bytearray(whole())
    found[found.index(at) + offset] ^= 1
    return bytes(found)


def overlapping() -> bytes:
    """Two entries of the directory that say where the same record is."""
    found = bytearray(whole())
    first = found.index(b"PK\x01\x02")
    second = found.index(b"PK\x01\x02", first + 4)
    found[second + 42 : second + 46] = found[first + 42 : first + 46]
    return bytes(found)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(with_record("whole/data.pkl"), r"names 'whole/data.pkl' twice", id="twice"),
        pytest.param(with_record("whole/DATA.pkl"), r"names 'whole/data.pkl' twice", id="twice but for the case"),
        pytest.param(with_record("other/data.pkl"), r"more than one folder", id="a second folder"),
        pytest.param(lambda: b"PK\x03\x04" + whole(), r"broken|disagree|not at the end", id="bytes before"),
        pytest.param(lambda: whole() + b"more", r"cut short|not at the end of the file", id="bytes after"),
        pytest.param(lambda: whole()[:-2] + b"\x04\0more", r"not at the end of the file", id="a comment"),
        pytest.param(lambda: flipped(b"PK\x03\x04\0\0", 30), r"disagree", id="another name in the record"),
        pytest.param(lambda: with_directory(24, "<I", 1 << 31), r"lists more|disagree", id="a huge size"),
        pytest.param(lambda: with_directory(42, "<I", 0xFFFFFFF0), r"broken|disagree", id="a place beyond the end"),
        pytest.param(lambda: with_directory(28, "<H", 0xFFFF), r"cannot be read", id="a long name"),
        pytest.param(overlapping, r"disagree", id="entries on top of each other"),
        pytest.param(lambda: flipped(struct.pack("<f", 5.0)), r"damaged \(wrong checksum\)", id="a flipped bit"),
    ],
)
def test_archives_that_two_programs_read_differently(make: Callable[[], bytes], reason: str) -> None:
    content = make()
    Path("evil.pth").write_bytes(content)
    refused("evil.pth", reason)


def test_archives_without_checksums_and_rezipped_ones_are_read() -> None:
    Path("again.pth").write_bytes(rezipped(copy, lambda made: None))
    assert torch.equal(read_state_dict("again.pth")["b"], STATE["b"])
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, "unsummed.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(read_state_dict("unsummed.pth")["a.weight"], STATE["a.weight"])


def test_reading_without_values_gives_the_same_content() -> None:
    torch.save({"meta": {"iter": 7}, "state_dict": STATE}, "a.pth")
    found = reading.peek("a.pth")
    assert found["meta"] == {"iter": 7}
    assert torch.equal(found["state_dict"]["b"], STATE["b"])
    Path("b.pth").write_bytes(Path("a.pth").read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="cut short"):
        reading.peek("b.pth")


# Safetensors ------------------------------------------------------------------------------------------------------


def safetensors(header: Any, content: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


def entry(begin: Any, end: Any, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (safetensors({"w": entry(0, 1e400)}), "is broken"),
        (safetensors(b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,' + b"9" * 5000 + b"]}}"), "out of range"),
        (safetensors({"w": entry(-8, 8)}), "invalid value: integer `-8`"),
        (safetensors({"w": entry(8, 0)}), "invalid offset for tensor `w`"),
        (safetensors({"w": entry(0, 8.0)}), "invalid type: floating point"),
        (safetensors({"w": entry(0, "8")}), "invalid type: string"),
        (safetensors({"w": entry(0, True)}), "invalid type: boolean"),
        (safetensors({"w": entry(0, 8, [1 << 33, 1 << 33])}), "overflow"),
        (safetensors({"w": entry(0, 8, [-2])}), "invalid value: integer `-2`"),
        (safetensors({"w": entry(0, 8, [3])}), "is broken"),
        (safetensors({"w": entry(0, 8, 2)}), "is broken"),
        (safetensors({"w": entry(0, 8), "v": entry(0, 8)}), "invalid offset"),
        (safetensors({"w": entry(0, 4, [1]), "v": entry(2, 6, [1])}), "invalid offset"),
        (safetensors({"w": entry(4, 8, [1])}), "invalid offset"),
        (safetensors(b'{"w":%(e)s,"w":%(e)s}' % {b"e": json.dumps(entry(0, 8)).encode()}), "it has a name twice"),
        (safetensors({"w": {"dtype": "F32"}}), "is broken"),
        (safetensors({"w": 1}), "is broken"),
        (safetensors({"w": entry(0, 8, dtype="F99")}), "unknown variant `F99`"),
        (safetensors(b'{"w":' + b"[" * 100_000), "is broken"),
        (safetensors({"__metadata__": 1, "w": entry(0, 8)}), "is broken"),
        (safetensors({"w": entry(0, 16, [4])}), "cut short"),
        (safetensors({"w": entry(0, 8)}) + b"more", "4 bytes longer"),
        (struct.pack("<Q", 1 << 31) + b"{", "cut short"),
        (struct.pack("<q", -1) + b"{", "not a file of weights"),
    ],
)
def test_lists_of_tensors_with_wrong_entries(content: bytes, reason: str) -> None:
    Path("evil.safetensors").write_bytes(content)
    refused("evil.safetensors", reason)


def test_a_list_of_absurd_length_is_not_read(tmp_path: Path) -> None:
    with open("sparse.safetensors", "wb") as file:  # 200 MB of nothing, which take no room
        file.write(struct.pack("<Q", 200_000_000) + b"{")
        file.truncate(200_000_100)
    refused("sparse.safetensors", "header too large")


# Content of the wrong kind ----------------------------------------------------------------------------------------


def laughs(depth: int) -> Any:
    value: Any = ["ha"] * 10
    for _ in range(depth):
        value = [value] * 10
    return value


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def hiding(**attributes: Any) -> Any:
    """An ordered dictionary whose attributes hide its methods."""
    found = collections.OrderedDict(STATE)
    found.__dict__.update(attributes)
    return found


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:Sparse CSR")
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: {**STATE, "w": torch.zeros(1).expand(1 << 40)}, r"w has 1,099,511,627,776 values, of which the file"),
        (lambda: {**STATE, "w": torch.zeros(3).as_strided((2, 2), (1, 1))}, r"w has 4 values, of which the file"),
        (lambda: {**STATE, "w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, "w is quantized"),
        (lambda: {**STATE, "w": torch.eye(2).to_sparse_csr()}, "w is sparse"),
        (lambda: {**STATE, 3: torch.ones(1)}, "3 is not a valid name of a tensor"),
        (lambda: {**STATE, "\x1b[31mred": torch.ones(1)}, r"'\\x1b\[31mred' is not a valid name"),
        (lambda: {**STATE, "a\nb": torch.ones(1)}, r"'a\\nb' is not a valid name"),
        (lambda: {**STATE, "n" * 100_000: torch.ones(1)}, "is not a valid name of a tensor"),
        (lambda: {"x" * 100_000: 1}, r"holds no weights \(its keys: x{60}\)"),
        (lambda: {"model": STATE, "args": laughs(12)}, "nested or repeated too much"),
        (lambda: {"model": STATE, "args": nested(200)}, "nested or repeated too much"),
        (lambda: {"model": STATE, "epoch": 1 << 20_000}, "cannot be read"),
        (lambda: {"model": [1]}, "holds no weights"),
        (lambda: {"model": {}}, "holds no weights"),
        (lambda: STATE["b"], "holds a Tensor"),
    ],
)
def test_content_of_the_wrong_kind(content: Callable[[], Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_MOST", reading._MOST // 20)  # counting to it takes seconds
    torch.save(content(), "evil.pth")
    refused("evil.pth", reason)


def test_attributes_in_a_file_hide_nothing() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    weight.isfinite = weight.round = 1
    torch.save({"state_dict": hiding(get=1, keys=2, values=3, _metadata=4), "w": weight}, "a.pth")
    assert torch.equal(read_state_dict("a.pth")["b"], STATE["b"])
    found = read_checkpoint("a.pth")
    assert type(found["state_dict"]) is dict
    assert found["w"].numel() == 2
    assert not vars(found["w"])


def test_nothing_is_allocated_before_it_is_checked() -> None:
    """The file claims a terabyte; the used memory does not grow."""
    torch.save({**STATE, "w": torch.zeros(1).expand(1 << 40)}, "evil.pth")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused("evil.pth", "of which the file holds fewer")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (torch.tensor([1, 2]), "of another kind of numbers"),
        (torch.tensor([True, False]), "of another kind of numbers"),
        (torch.tensor([1j, 2]), "of another kind of numbers"),
        (torch.tensor([1.0, float("nan")]), "not finite"),
        (torch.tensor([1.0, -float("inf")]), "not finite"),
        (torch.tensor([1.0, 1e300], dtype=torch.float64), "too large for float32"),
        (torch.tensor([1.0, float("nan")], dtype=torch.float64), "not finite"),
    ],
)
def test_invalid_numbers(value: torch.Tensor, kind: str) -> None:
    own = {"w": torch.zeros(2), "count": torch.tensor(0)}
    ((found, (name,)),) = wrong_numbers({"w": value}, own)
    assert found == kind
    assert name.split()[0] == "w"
    assert not wrong_numbers({"w": value}, {})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_valid_numbers(dtype: torch.dtype) -> None:
    own = {"w": torch.zeros(2), "count": torch.tensor(0)}
    assert not wrong_numbers({"w": torch.ones(2, dtype=dtype), "count": torch.tensor(3.0)}, own)
    assert wrong_numbers({"count": torch.tensor(2.5)}, own) == [("of another kind of numbers", ["count float32"])]


# Any damage -------------------------------------------------------------------------------------------------------

KINDS = {"zip": "w.pth", "old": "old.pth", "safetensors": "w.safetensors"}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_one_line_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    """Bytes changed, cut out, doubled. A zip archive notices every change of its tensors; the others cannot."""
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    if kind == "safetensors":
        good = save(STATE)
    else:
        torch.save(STATE, "good.pth", _use_new_zipfile_serialization=kind == "zip")
        good = Path("good.pth").read_bytes()
    found = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        begin = data.draw(st.integers(0, len(found) - 1))
        end = data.draw(st.integers(begin, min(len(found), begin + 64)))
        found[begin:end] = data.draw(st.binary(max_size=64) | st.just(bytes(found[begin:end]) * 2))
    path = Path(KINDS[kind])
    path.write_bytes(found)
    problem = ""
    try:
        state = read_state_dict(path)
    except CheckpointError as error:
        problem = str(error)
    if problem:
        assert re.fullmatch(rf"checkpoint {re.escape(str(path))}: [^\n]+", problem)
        return
    assert all(isinstance(name, str) and value.is_contiguous() is not None for name, value in state.items())
    if kind == "zip" and state.keys() == STATE.keys():
        assert all(torch.equal(state[name], STATE[name]) for name in STATE), "wrong numbers, unnoticed"


def test_save_file_still_works() -> None:
    """The lists above are refused because of their content, not because of the helper that wrote them."""
    save_file(STATE, "good.safetensors")
    assert torch.equal(read_state_dict("good.safetensors")["b"], STATE["b"])
    Path("made.safetensors").write_bytes(safetensors({"w": entry(0, 8)}))
    assert read_state_dict("made.safetensors")["w"].tolist() == [0, 0]


SPOILED = (
    lambda v: v.int(), lambda v: v * 1j, lambda v: v.to_sparse(), lambda v: v.to("meta"), lambda v: v[:0],
    lambda v: torch.full_like(v, torch.nan), lambda v: torch.full_like(v, 1e300, dtype=torch.float64),
    lambda v: torch.ones(1).expand(1 << 40), lambda v: "text", lambda v: None, lambda v: [v],
)  # fmt: skip


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_change_of_published_weights_passes(tmp_path: Path, data: st.DataObject) -> None:
    """Verifying finds it, converting refuses it and writes nothing."""
    name = data.draw(
        st.sampled_from(sorted(name for name, v in published_files.STATE.items() if v.is_floating_point()))
    )
    state = dict(published_files.STATE)
    if data.draw(st.booleans()):
        state[name] = data.draw(st.sampled_from(SPOILED))(state[name])
    else:
        state[data.draw(st.text())] = state.pop(name)
    torch.save({"model": state}, "w.pth")
    found = checkpoints.verify("w.pth", published_files.NAME)
    assert not found.ok
    assert not any("\n" in problem for problem in found.problems)
    with pytest.raises(CheckpointError, match=r"^checkpoint w.pth: [^\n]+$"):
        checkpoints.convert_file("w.pth", published_files.NAME, out="out.safetensors")
    assert not list(tmp_path.glob("out*"))
