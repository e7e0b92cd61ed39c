"""What every executor must do, whatever its ring and wherever its files are: the same bytes, the same promises."""

from __future__ import annotations

import errno
import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod

import pytest
import torch
from executor_fakes import (
    BlockFiles,
    Call,
    Entry,
    Files,
    MemoryBackend,
    Source,
    Target,
    memory_of,
    naive_file,
    naive_payload,
    random_tensor,
    save_of,
)
from executor_rings import EXECUTORS, Ring
from hypothesis import given, settings
from hypothesis import strategies as st

from gpudcp.boxes import row_major_strides
from gpudcp.chunkplan.load import (
    NO_DESTINATION,
    LoadChunkPlan,
    PayloadCheck,
    ReadRequest,
    plan_load,
    whole_payload_request,
)
from gpudcp.chunkplan.save import LiteralWrite, SaveChunkPlan, SaveFilePlan
from gpudcp.errors import CheckpointNotFoundError, CorruptCheckpointError, TransferError
from gpudcp.executors.base import FileReceipt
from gpudcp.report import Stopwatch

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

DTYPES = [
    torch.bool,
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex32, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    torch.float4_e2m1fn_x2,
]


def finite(*sizes: int, dtype: torch.dtype) -> torch.Tensor:
    """Random values without NaN, denormals, huge ones and infinities included where the dtype has them."""
    tensor = random_tensor(*sizes, dtype=dtype)
    if dtype.is_complex:
        parts = torch.view_as_real(tensor)
        parts[parts.isnan()] = 1.0
    elif dtype.is_floating_point:
        tensor = tensor.nan_to_num(1.0, torch.inf, -torch.inf) if dtype.itemsize > 1 else tensor
    return tensor


def dtypes_of(ring: Ring) -> list[torch.dtype]:
    """Every dtype; where that takes long, one of each size, because bits are what moves."""
    return list({dtype.itemsize: dtype for dtype in DTYPES}.values()) if ring.is_slow else list(DTYPES)


# --- save ------------------------------------------------------------------------------------------------------------


def save(
    ring: Ring, files: Files, plan: SaveChunkPlan, source: Source, *, has_checksum: bool = True
) -> list[FileReceipt]:
    """One save by the ring's executor."""
    return ring.make(has_checksum=has_checksum).save(plan, source, files.open_writer, Stopwatch())


def check_save(ring: Ring, files: Files, entries: Sequence[Entry], *, has_checksum: bool = True) -> None:
    """Save, and compare file and receipts with the naive reference, byte for byte."""
    plan, source = save_of(entries, slab_nbytes=ring.slab_nbytes)
    receipts = save(ring, files, plan, source, has_checksum=has_checksum)
    expected, crcs = naive_file(plan.files[0], source, has_checksum=has_checksum)
    assert files.content("file") == expected
    assert receipts == [FileReceipt(len(expected), crcs)]
    assert sorted(source.resolved) == sorted(source.tensors)
    assert files.running == files.nopen == 0


def test_a_contiguous_tensor_of_every_dtype_is_written_bit_for_bit(ring: Ring, files: Files) -> None:
    """Random bits, so NaNs with payloads too, in one tensor within a slab and one across slabs."""
    check_save(ring, files, [random_tensor(n, dtype=dtype) for dtype in dtypes_of(ring) for n in (5, 5000)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_strided_tensor_of_every_dtype_is_written_row_major(ring: Ring, dtype: torch.dtype) -> None:
    """Transposed and stepped, bit for bit: moving elements must not need arithmetic on them."""
    files = Files(MemoryBackend())
    tensor = random_tensor(7, 300, dtype=dtype)
    check_save(ring, files, [tensor.t(), tensor[::2, 1::3], tensor[1:, 5:].t()])


def test_layouts_are_written_row_major(ring: Ring, files: Files) -> None:
    """What a file holds does not depend on how the tensor lay in memory."""
    big, image = random_tensor(130, 170), random_tensor(2, 3, 8, 5)
    rows = 3 if ring.is_slow else 40
    check_save(
        ring,
        files,
        [
            big.t(),
            big[::3, :: -1 + 3],
            big[3:100, 7:9],
            random_tensor(1, 3000).expand(rows, 3000),
            random_tensor(rows, 1).expand(rows, 3000),
            random_tensor(1)[0].expand(9, 9),
            image.to(memory_format=torch.channels_last),
            image.permute(3, 1, 0, 2),
            big.as_strided((5, 4), (1, 1)),
            big[50:],
            big.view(-1)[11:],
        ],
    )


def test_tensors_without_dimensions_or_elements_are_written(ring: Ring, files: Files) -> None:
    """A 0-d tensor is one element, a zero-element one an envelope alone; views of nothing too."""
    check_save(
        ring,
        files,
        [
            torch.tensor(3.5),
            torch.empty(0),
            torch.empty(3, 0, 2),
            random_tensor(4, 4)[:, :0].t(),
            torch.tensor(7, dtype=torch.int16),
            torch.tensor(2 - 3j).conj(),
            random_tensor(3, 3)[1, 2],
            torch.empty(0, dtype=torch.complex64).conj(),
        ],
    )


@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex64, torch.complex128], ids=str)
def test_conjugate_and_negative_views_are_written_resolved(ring: Ring, dtype: torch.dtype) -> None:
    """The bits that say conj and neg are torch's own: a file has none."""
    files = Files(MemoryBackend())
    tensor = finite(60, 70, dtype=dtype)
    entries: list[Entry] = [tensor.conj(), tensor.conj().t(), tensor.conj()[::2, 3:], tensor.conj().imag]
    assert entries[0].is_conj()
    assert entries[3].is_neg()
    check_save(ring, files, [*entries, torch._neg_view(finite(33, dtype=torch.float32))])


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float16, torch.bfloat16),
        (torch.int32, torch.float32),
        (torch.float64, torch.float32),
        (torch.float32, torch.float8_e4m3fn),
        (torch.float32, torch.float8_e5m2),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float64),
        (torch.float8_e4m3fn, torch.float32),
        (torch.int8, torch.int64),
        (torch.uint8, torch.float16),
        (torch.bool, torch.float32),
        (torch.complex64, torch.complex128),
        (torch.float32, torch.complex64),
    ],
    ids=str,
)
def test_a_cast_gives_what_torch_gives(ring: Ring, source: torch.dtype, target: torch.dtype) -> None:
    """Narrowing and widening, of tensors within a slab and across slabs, contiguous and not."""
    files = Files(MemoryBackend())
    big = finite(60, 70, dtype=source)
    if source == torch.float8_e4m3fn:
        big.view(torch.uint8)[big.isnan()] = 1
    check_save(ring, files, [(finite(10, dtype=torch.int8), torch.int32), (big, target), (big.t(), target)])


def test_a_cast_resolves_conjugate_and_negative_views(ring: Ring, files: Files) -> None:
    """The cast is of the value, not of the memory."""
    tensor = finite(30, 40, dtype=torch.complex64)
    check_save(ring, files, [(tensor.conj(), torch.complex128), (tensor.conj().imag, torch.float64)])


def test_items_and_literals_larger_than_the_ring_are_written(ring: Ring, files: Files) -> None:
    """A slab ends anywhere in an item: in the envelope, in the payload, in a literal."""
    ring_nbytes = min(ring.lanes * ring.slab_nbytes, 16 << 10)
    big = random_tensor(3, ring_nbytes // 4 + 77)
    literal = bytes(random_tensor(2 * ring_nbytes + 13, dtype=torch.uint8))
    check_save(
        ring,
        files,
        [b"x", big, big.t(), (finite(*big.shape, dtype=torch.float32), torch.bfloat16), literal, b"", big[:1], literal],
    )


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097, 8192, 12288, 12289])
def test_a_file_has_exactly_the_length_of_its_plan(ring: Ring, files: Files, nbytes: int) -> None:
    """Writes are whole blocks; a file need not be, and may be empty."""
    check_save(ring, files, [bytes(range(256)) * (nbytes // 256) + bytes(nbytes % 256)])


def test_zeros_stand_between_writes_and_after_the_last(ring: Ring, files: Files) -> None:
    """The slabs of a ring are used again: what they held must not show in a gap."""
    offsets = (0, 20_000, 20_001, 41_000)
    writes = tuple(
        LiteralWrite(n, offset, 9_999 if n != 1 else 1, b"\xff" * (9_999 if n != 1 else 1))
        for n, offset in enumerate(offsets)
    )
    file = SaveFilePlan(path="file", nbytes=55_555, slab_nbytes=ring.slab_nbytes, writes=writes)
    receipts = save(ring, files, SaveChunkPlan(files=(file,)), Source({}))
    expected, crcs = naive_file(file, Source({}))
    assert files.content("file") == expected
    assert receipts == [FileReceipt(55_555, crcs)]


def test_the_bytes_do_not_depend_on_the_ring(rings: list[Ring]) -> None:
    """Lanes, threads and slab size are about speed: same plan, same bytes."""
    entries: list[Entry] = [
        random_tensor(50, 90),
        random_tensor(90, 50).t(),
        b"object",
        finite(777, dtype=torch.complex64).conj(),
    ]
    contents = set()
    for ring in rings:
        files = Files(MemoryBackend())
        plan, source = save_of(entries, slab_nbytes=ring.slab_nbytes)
        save(ring, files, plan, source)
        contents.add(files.content("file"))
    assert len(contents) == 1


def test_without_checksums_receipts_have_none_and_files_zeros(ring: Ring, files: Files) -> None:
    """CRC 0 on a payload means: written without checksums."""
    entries = [random_tensor(10), random_tensor(80, 50).t(), b"object", random_tensor(5000)]
    check_save(ring, files, entries, has_checksum=False)


def test_writes_are_aligned_disjoint_and_cover_the_file(ring: Ring, files: Files) -> None:
    """Offset, length and address are what the file can take; each byte is written once; no call is a small one."""
    plan, source = save_of(
        [random_tensor(30, 700), b"x" * 5000, random_tensor(300, 300), random_tensor(99)], slab_nbytes=ring.slab_nbytes
    )
    save(ring, files, plan, source)
    writes = sorted(files.calls_of("write"), key=lambda call: call.byte_offset)
    alignment = files.alignment_nbytes
    assert {number % alignment for call in writes for number in (call.byte_offset, call.nbytes, call.address)} == {0}
    ends = [0, *(call.byte_offset + call.nbytes for call in writes)]
    assert [call.byte_offset for call in writes] == ends[:-1]
    assert 0 <= ends[-1] - plan.files[0].nbytes < alignment
    if alignment > 1:
        slabs = list(plan.files[0].slabs())
        assert [call.byte_offset for call in writes] == [start for start, _ in slabs]
    else:
        # Besides the slabs: the two ends of the one tensor that is large enough to go past them.
        assert len(writes) <= plan.files[0].nbytes // ring.slab_nbytes + 3


def test_small_tensors_share_their_writes(ring: Ring, files: Files) -> None:
    """A thousand tensors cost as many writes as the file has slabs, be they strided or not."""
    count = 20 if ring.is_slow else 500
    entries = [random_tensor(2, 8, seed=n) for n in range(count)]
    entries += [random_tensor(8, 2, seed=n).t() for n in range(count)]
    plan, source = save_of(entries, slab_nbytes=ring.slab_nbytes)
    save(ring, files, plan, source)
    assert len(files.calls_of("write")) == -(-plan.files[0].nbytes // ring.slab_nbytes)
    assert len(files.calls_of("create")) == len(files.calls_of("finish")) == 1


def test_a_file_is_finished_after_its_last_write(ring: Ring, files: Files) -> None:
    """`finish` brings the file to stable storage: what comes after it would not be there."""
    plan, source = save_of([random_tensor(9000)], slab_nbytes=ring.slab_nbytes)
    save(ring, files, plan, source)
    assert [call.kind for call in files.calls][-1] == "finish"
    assert files.calls[-1].nbytes == plan.files[0].nbytes


def test_every_file_of_a_plan_is_written(ring: Ring, files: Files) -> None:
    """One receipt for each file, in the plan's order."""
    first, source = save_of([random_tensor(3000), b"a"], slab_nbytes=ring.slab_nbytes, path="one")
    second, _ = save_of([random_tensor(3000), b"bb", b"c"], slab_nbytes=ring.slab_nbytes, path="two")
    renumbered = tuple(write._replace(position=write.position + 10) for write in second.files[0].writes)
    plan = SaveChunkPlan(files=(first.files[0], replace(second.files[0], writes=renumbered)))
    source.tensors[10] = random_tensor(3000, seed=1)
    receipts = save(ring, files, plan, source)
    for file, receipt in zip(plan.files, receipts, strict=True):
        expected, crcs = naive_file(file, source)
        assert files.content(file.path) == expected
        assert receipt == FileReceipt(file.nbytes, crcs)


def test_a_plan_without_files_writes_nothing(ring: Ring, files: Files) -> None:
    """A rank that owns nothing makes no file."""
    assert save(ring, files, SaveChunkPlan(files=()), Source({})) == []
    assert files.calls == []


def test_a_tensor_that_requires_grad_is_saved(ring: Ring, files: Files) -> None:
    """Parameters are what checkpoints are made of, cast and strided ones too."""
    parameter = torch.nn.Parameter(finite(40, 50, dtype=torch.float32))
    check_save(ring, files, [parameter, parameter.t(), (parameter, torch.bfloat16), parameter * 2])


def test_a_write_that_fails_is_raised_and_leaves_no_file(ring: Ring, files: Files) -> None:
    """Of two failed writes the first in the file is raised; nothing is running when the caller hears of it."""
    plan, source = save_of([random_tensor(4 * ring.slab_nbytes // 4 + 5), b"x"], slab_nbytes=ring.slab_nbytes)
    failing = {n * ring.slab_nbytes: TransferError(f"slab {n}", path="file", errno=errno.ENOSPC) for n in (1, 3)}

    def fail(call: Call) -> None:
        for byte_offset, error in failing.items():
            if call.kind == "write" and call.byte_offset <= byte_offset < call.byte_offset + call.nbytes:
                raise error

    files.on_call = fail
    with pytest.raises(TransferError) as caught:
        save(ring, files, plan, source)
    assert caught.value is failing[ring.slab_nbytes]
    assert files.running == files.nopen == 0
    assert files.names() == []
    assert files.calls_of("finish") == []


def test_a_write_still_running_beside_a_failed_one_is_waited_for(ring: Ring, files: Files) -> None:
    """The slab under a running write must not be freed, nor its file be closed."""
    ring = replace(ring, lanes=ring.lanes + 1, threads=ring.threads + 1)
    plan, source = save_of([b"x" * (2 * ring.slab_nbytes)], slab_nbytes=ring.slab_nbytes)
    is_second_running, has_first_failed = threading.Event(), threading.Event()

    def fail(call: Call) -> None:
        if call.kind != "write":
            return
        if call.byte_offset:
            is_second_running.set()
            has_first_failed.wait(5)
            threading.Event().wait(0.05)
        else:
            is_second_running.wait(5)
            has_first_failed.set()
            raise TransferError("first", path="file")

    files.on_call = fail
    with pytest.raises(TransferError, match=r"^first$"):
        save(ring, files, plan, source)
    assert is_second_running.is_set()
    assert files.running == files.nopen == 0
    assert files.names() == []


@pytest.mark.parametrize("error", [ValueError("no such tensor"), KeyboardInterrupt()], ids=repr)
def test_a_source_that_fails_is_raised_and_leaves_no_file(ring: Ring, files: Files, error: BaseException) -> None:
    """The planner's own error, as it is, after the writes on their way have ended."""
    plan, source = save_of([random_tensor(5000), random_tensor(20)], slab_nbytes=ring.slab_nbytes)
    tensor = source.tensors[0]

    class FailingSource(Source):
        def resolve(self, position: int) -> torch.Tensor:
            if position == 1:
                raise error
            return tensor

    with pytest.raises(type(error)) as caught:
        save(ring, files, plan, FailingSource({}))
    assert caught.value is error
    assert files.running == files.nopen == 0
    assert files.names() == []


@pytest.mark.parametrize("kind", ["create", "finish"])
def test_a_file_that_cannot_be_created_or_finished_is_raised_and_removed(ring: Ring, files: Files, kind: str) -> None:
    """A file that is not known to be on stable storage is no file."""
    plan, source = save_of([random_tensor(5000)], slab_nbytes=ring.slab_nbytes)
    error = TransferError(kind, path="file")

    def fail(call: Call) -> None:
        if call.kind == kind:
            raise error

    files.on_call = fail
    with pytest.raises(TransferError) as caught:
        save(ring, files, plan, source)
    assert caught.value is error
    assert files.names() == []
    assert files.nopen == 0


# --- load ------------------------------------------------------------------------------------------------------------


def request_of(
    stored: torch.Tensor,
    *,
    position: int = 0,
    payload_offset: int = 0,
    offsets: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    path: str = "file",
) -> ReadRequest:
    """The request for a box of a tensor whose storage stands as it is at ``payload_offset``."""
    lengths = tuple(stored.shape) if lengths is None else tuple(lengths)
    offsets = (0,) * stored.ndim if offsets is None else tuple(offsets)
    return ReadRequest(
        position, path, payload_offset, stored.dtype, stored.stride(), stored.storage_offset(), offsets, lengths
    )


def check_of(data: bytes, *, payload_offset: int, payload_nbytes: int, path: str = "file") -> PayloadCheck:
    """The right check of a payload in a file."""
    crc = zlib.crc32(data[payload_offset : payload_offset + payload_nbytes])
    return PayloadCheck(path, payload_offset, payload_nbytes, crc, f"tensor.{payload_offset}")


def plan_of(
    ring: Ring, requests: Sequence[ReadRequest], checks: Sequence[PayloadCheck] = (), *, gap_nbytes: int = 512
) -> LoadChunkPlan:
    """The load plan for the ring's slabs."""
    return plan_load(requests, checks, slab_nbytes=ring.slab_nbytes, gap_nbytes=gap_nbytes)


def load(ring: Ring, files: Files, plan: LoadChunkPlan, target: Target) -> None:
    """One load by the ring's executor."""
    ring.make().load(plan, target, files.open_reader, Stopwatch())


def put_payloads(files: Files, tensors: Sequence[torch.Tensor], *, before: int = 0) -> tuple[bytes, list[int]]:
    """A file with the storages of these tensors, ``before`` bytes before each; its bytes and their offsets."""
    data, offsets = bytearray(), []
    for tensor in tensors:
        data += b"\xee" * before
        offsets.append(len(data))
        data += memory_of(tensor).tobytes()
    files.put("file", bytes(data))
    return bytes(data), offsets


def blank(*sizes: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of ones' bits, which no load leaves."""
    return torch.full((prod(sizes) * dtype.itemsize,), 0x01, dtype=torch.uint8).view(dtype).view(sizes)


@pytest.mark.parametrize("before", [0, 1, 3, 7, 64])
def test_a_payload_of_every_dtype_is_read_from_any_byte(ring: Ring, files: Files, before: int) -> None:
    """Stock files hold payloads at odd bytes, and what is read is bit for bit what is there."""
    stored = [random_tensor(n, dtype=dtype) for dtype in dtypes_of(ring) for n in (5, 3000)]
    data, offsets = put_payloads(files, stored, before=before)
    requests = [request_of(tensor, position=n, payload_offset=offsets[n]) for n, tensor in enumerate(stored)]
    checks = [
        check_of(data, payload_offset=offsets[n], payload_nbytes=tensor.nbytes) for n, tensor in enumerate(stored)
    ]
    target = Target({n: blank(*tensor.shape, dtype=tensor.dtype) for n, tensor in enumerate(stored)})
    load(ring, files, plan_of(ring, requests, checks), target)
    assert target.committed == {n: memory_of(tensor).tobytes() for n, tensor in enumerate(stored)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint16, torch.complex32, torch.float4_e2m1fn_x2], ids=str)
def test_boxes_of_stored_tensors_of_any_strides_are_read(ring: Ring, files: Files, dtype: torch.dtype) -> None:
    """Rows, columns and inner boxes of row-major, transposed, stepped and expanded payloads."""
    base = random_tensor(60, 90, dtype=dtype)
    stored = [base, base.t(), base[::2, 3::4], random_tensor(1, 50, dtype=dtype).expand(30, 50), base.view(5, 12, 90)]
    _, offsets = put_payloads(files, stored, before=13)
    requests, expected, target = [], {}, Target({})
    for number, tensor in enumerate(stored):
        whole = tuple(tensor.shape)
        for box_offsets, lengths in (
            ((0,) * tensor.ndim, whole),
            ((3, *(0 for _ in whole[1:])), (2, *whole[1:])),
            ((*(0 for _ in whole[1:]), 7), (*whole[:-1], 1)),
            ((1,) * tensor.ndim, tuple(length - 2 for length in whole)),
        ):
            position = len(requests)
            box = tensor[tuple(slice(o, o + n) for o, n in zip(box_offsets, lengths, strict=True))]
            requests.append(
                request_of(
                    tensor,
                    position=position,
                    payload_offset=offsets[number],
                    offsets=box_offsets,
                    lengths=lengths,
                )
            )
            expected[position] = naive_payload(box, dtype)
            target.destinations[position] = blank(*lengths, dtype=dtype)
    load(ring, files, plan_of(ring, requests), target)
    assert target.committed == expected


@pytest.mark.parametrize("stored_layout", ["rows", "columns"])
def test_destinations_of_any_strides_are_filled_and_nothing_beside_them(
    ring: Ring, files: Files, stored_layout: str
) -> None:
    """Transposed, stepped, inner boxes of larger tensors: the elements between them stay what they were."""
    stored = random_tensor(40, 60) if stored_layout == "rows" else random_tensor(60, 40).t()
    put_payloads(files, [stored])
    wide = [random_tensor(100, 200, seed=seed) for seed in range(4)]
    destinations = [
        wide[0][:60, :40].t(),
        wide[1][::2, 20:140:2][:40],
        wide[2][5:45, 7:67],
        wide[3].view(-1).as_strided((40, 60), (1, 40)),
    ]
    expected = [tensor.clone() for tensor in wide]
    copies = [
        expected[0][:60, :40].t(),
        expected[1][::2, 20:140:2][:40],
        expected[2][5:45, 7:67],
        expected[3].view(-1).as_strided((40, 60), (1, 40)),
    ]
    for copy in copies:
        copy.view(torch.int32).copy_(stored.view(torch.int32))
    target = Target(dict(enumerate(destinations)))
    load(ring, files, plan_of(ring, [request_of(stored, position=n) for n in range(4)]), target)
    assert [memory_of(tensor).tobytes() for tensor in wide] == [memory_of(tensor).tobytes() for tensor in expected]


@pytest.mark.parametrize(
    ("stored_dtype", "dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float16),
        (torch.float8_e5m2, torch.float32),
        (torch.int64, torch.int32),
        (torch.complex64, torch.complex128),
        (torch.uint16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.int32),
    ],
    ids=str,
)
def test_a_cast_on_load_gives_what_copy_gives(ring: Ring, stored_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """Whole tensors, columns of them, and transposed destinations."""
    files = Files(MemoryBackend())
    stored = finite(50, 70, dtype=stored_dtype)
    if dtype == torch.int32:
        stored = stored.clamp(-1e6, 1e6)  # beyond its range a cast to an integer is undefined
    if stored_dtype == torch.float8_e5m2:
        stored.view(torch.uint8)[stored.isnan()] = 1
    put_payloads(files, [stored], before=9)
    target = Target({0: blank(50, 70, dtype=dtype), 1: blank(50, 3, dtype=dtype), 2: blank(70, 50, dtype=dtype).t()})
    expected = [torch.empty(50, 70, dtype=dtype), torch.empty(50, 3, dtype=dtype), torch.empty(70, 50, dtype=dtype).t()]
    for destination, box in zip(expected, (stored, stored[:, 4:7], stored), strict=True):
        destination.copy_(box)
    requests = [
        request_of(stored, position=0, payload_offset=9),
        request_of(stored, position=1, payload_offset=9, offsets=(0, 4), lengths=(50, 3)),
        request_of(stored, position=2, payload_offset=9),
    ]
    load(ring, files, plan_of(ring, requests), target)
    assert target.committed == {n: memory_of(tensor).tobytes() for n, tensor in enumerate(expected)}


def test_conjugate_and_negative_destinations_get_the_values(ring: Ring, files: Files) -> None:
    """Such a destination holds the value's negative in memory; reading it must give the value."""
    stored = finite(40, 50, dtype=torch.complex64)
    real = finite(40, 50, dtype=torch.float32)
    _, offsets = put_payloads(files, [stored, real])
    destinations = {
        0: blank(40, 50, dtype=torch.complex64).conj(),
        1: torch._neg_view(blank(40, 50, dtype=torch.float32)),
    }
    requests = [request_of(tensor, position=n, payload_offset=offsets[n]) for n, tensor in enumerate((stored, real))]
    load(ring, files, plan_of(ring, requests), Target(dict(destinations)))
    assert naive_payload(destinations[0], torch.complex64) == memory_of(stored).tobytes()
    assert naive_payload(destinations[1], torch.float32) == memory_of(real).tobytes()


def test_large_gapless_chunks_are_read_into_any_destination(ring: Ring, files: Files) -> None:
    """Those that may go straight into memory, and those whose destination has another dtype or strides."""
    ring = replace(ring, slab_nbytes=512 << 10)
    stored = finite(400, 500, dtype=torch.float32)
    data, offsets = put_payloads(files, [stored] * 3, before=1)
    checks = [check_of(data, payload_offset=offset, payload_nbytes=stored.nbytes) for offset in offsets]
    requests = [request_of(stored, position=n, payload_offset=offset) for n, offset in enumerate(offsets)]
    plan = plan_of(ring, requests, checks)
    assert all(read.is_straight for read in plan.reads)
    assert len(plan.reads) == 6
    target = Target(
        {
            0: blank(400, 500, dtype=torch.float32),
            1: blank(400, 500, dtype=torch.bfloat16),
            2: blank(500, 400, dtype=torch.float32).t(),
        }
    )
    load(ring, files, plan, target)
    assert target.committed == {
        0: memory_of(stored).tobytes(),
        1: memory_of(stored.to(torch.bfloat16)).tobytes(),
        2: memory_of(stored.t().contiguous()).tobytes(),
    }


def test_several_files_are_read(ring: Ring, files: Files) -> None:
    """Each read goes to its own file, and each file is opened by the name in the plan."""
    tensors = [random_tensor(1500, seed=seed) for seed in range(5)]
    for number, tensor in enumerate(tensors):
        files.put(f"file{number}", memory_of(tensor).tobytes())
    requests = [request_of(tensors[n], position=n, path=f"file{n}") for n in (3, 1, 0, 4, 2)]
    target = Target({n: blank(1500, dtype=torch.float32) for n in range(5)})
    load(ring, files, plan_of(ring, requests), target)
    assert target.committed == {n: memory_of(tensor).tobytes() for n, tensor in enumerate(tensors)}


def test_small_items_share_their_reads(ring: Ring, files: Files) -> None:
    """As many reads as the plan has: no call for each tensor."""
    tensors = [random_tensor(4, 4, seed=seed) for seed in range(400)]
    _, offsets = put_payloads(files, tensors, before=3)
    plan = plan_of(ring, [request_of(t, position=n, payload_offset=offsets[n]) for n, t in enumerate(tensors)])
    target = Target({n: blank(4, 4, dtype=torch.float32) for n in range(400)})
    load(ring, files, plan, target)
    assert len(files.calls_of("read")) == len(plan.reads) <= 1 + 400 * 67 // (ring.slab_nbytes - 64)
    assert target.committed == {n: memory_of(tensor).tobytes() for n, tensor in enumerate(tensors)}


def test_a_destination_is_resolved_just_before_its_first_byte_and_committed_once(ring: Ring, files: Files) -> None:
    """A planner may make destinations on demand: those of a few slabs exist at a time, not those of the checkpoint."""
    numel = ring.slab_nbytes // 4
    tensors = [random_tensor(numel, seed=seed) for seed in range(12)]
    _, offsets = put_payloads(files, tensors, before=1)
    requests = [request_of(t, position=n, payload_offset=offsets[n]) for n, t in enumerate(tensors)]
    target = Target({n: blank(numel, dtype=torch.float32) for n in range(12)})
    load(ring, files, plan_of(ring, requests, gap_nbytes=0), target)
    assert target.positions("resolve") == target.positions("commit") == list(range(12))
    assert target.most_open <= ring.lanes
    assert target.threads == {threading.get_ident()}
    assert target.committed == {n: memory_of(tensor).tobytes() for n, tensor in enumerate(tensors)}


def test_an_item_of_many_reads_is_committed_after_the_last_one(ring: Ring, files: Files) -> None:
    """Columns of a wide tensor are many reads; at the commit all of them are there."""
    stored = random_tensor(30, 700)
    put_payloads(files, [stored])
    request = request_of(stored, offsets=(0, 600), lengths=(30, 2))
    plan = plan_of(ring, [request], gap_nbytes=0)
    target = Target({0: blank(30, 2, dtype=torch.float32)})
    load(ring, files, plan, target)
    assert len(plan.reads) == 30
    assert target.events == [("resolve", 0), ("commit", 0)]
    assert target.committed[0] == naive_payload(stored[:, 600:602], torch.float32)


def test_empty_items_are_resolved_and_committed_and_nothing_is_read(ring: Ring, files: Files) -> None:
    """A rank's empty shard is a destination like any other."""
    stored = random_tensor(4, 5)
    put_payloads(files, [stored])
    requests = [request_of(stored, position=5, lengths=(0, 5)), request_of(stored, position=2, lengths=(4, 0))]
    target = Target({5: torch.empty(0, 5), 2: torch.empty(4, 0)})
    load(ring, files, plan_of(ring, requests), target)
    assert sorted(target.events) == [("commit", 2), ("commit", 5), ("resolve", 2), ("resolve", 5)]
    assert files.calls_of("read") == []
    target = Target({})
    load(ring, files, plan_of(ring, []), target)
    assert target.events == []


def test_right_checksums_pass_over_any_number_of_reads(ring: Ring, files: Files) -> None:
    """Payloads within a read, at its edges, and across several reads, at odd bytes."""
    tensors = [random_tensor(n, seed=n) for n in (10, 999, 1024, 5000, 1, 3000)]
    data, offsets = put_payloads(files, tensors, before=5)
    checks = [
        check_of(data, payload_offset=offset, payload_nbytes=tensor.nbytes)
        for tensor, offset in zip(tensors, offsets, strict=True)
    ]
    plan = plan_of(ring, [request_of(t, position=n, payload_offset=offsets[n]) for n, t in enumerate(tensors)], checks)
    assert len(plan.checks) == 6
    target = Target({n: blank(*tensor.shape, dtype=torch.float32) for n, tensor in enumerate(tensors)})
    load(ring, files, plan, target)
    assert target.committed == {n: memory_of(tensor).tobytes() for n, tensor in enumerate(tensors)}


@pytest.mark.parametrize("flipped", [0, 1, 2, 3])
def test_a_wrong_checksum_is_raised_before_the_item_is_committed(ring: Ring, files: Files, flipped: int) -> None:
    """One bit, in the first or the last byte of a payload, within one read or across many: it is named."""
    tensors = [random_tensor(n, seed=n) for n in (10, 5000, 20)]
    data, offsets = put_payloads(files, tensors)
    checks = [
        check_of(data, payload_offset=offset, payload_nbytes=tensor.nbytes)
        for tensor, offset in zip(tensors, offsets, strict=True)
    ]
    number, byte = ((0, 39), (1, 40), (1, 40 + 19_999), (2, 20_040))[flipped]
    corrupt = bytearray(data)
    corrupt[byte] ^= 1
    files.put("file", bytes(corrupt))
    target = Target({n: blank(*tensor.shape, dtype=torch.float32) for n, tensor in enumerate(tensors)})
    requests = [request_of(t, position=n, payload_offset=offsets[n]) for n, t in enumerate(tensors)]
    with pytest.raises(CorruptCheckpointError) as caught:
        load(ring, files, plan_of(ring, requests, checks), target)
    found = zlib.crc32(corrupt[offsets[number] : offsets[number] + tensors[number].nbytes])
    assert (caught.value.path, caught.value.fqn) == ("file", checks[number].fqn)
    assert (caught.value.expected_crc32, caught.value.found_crc32) == (checks[number].crc32, found)
    assert f"{found:#010x}" in str(caught.value)
    assert f"{checks[number].crc32:#010x}" in str(caught.value)
    assert number not in target.committed
    assert files.running == 0


def test_no_part_of_a_payload_is_committed_before_its_checksum_is_known(ring: Ring, files: Files) -> None:
    """Two items share a payload: the first has all its bytes long before the last byte of the payload is wrong."""
    stored = random_tensor(100, 200)
    data, _ = put_payloads(files, [stored, random_tensor(9)])
    check = check_of(data, payload_offset=0, payload_nbytes=stored.nbytes)
    corrupt = bytearray(data)
    corrupt[stored.nbytes - 1] ^= 0x80
    files.put("file", bytes(corrupt))
    requests = [
        request_of(stored, position=0, lengths=(3, 200)),
        request_of(stored, position=1, offsets=(3, 0), lengths=(97, 200)),
    ]
    target = Target({0: blank(3, 200, dtype=torch.float32), 1: blank(97, 200, dtype=torch.float32)})
    with pytest.raises(CorruptCheckpointError):
        load(ring, files, plan_of(ring, requests, [check]), target)
    assert target.positions("commit") == []
    files.put("file", data)
    target = Target({0: blank(3, 200, dtype=torch.float32), 1: blank(97, 200, dtype=torch.float32)})
    load(ring, files, plan_of(ring, requests, [check]), target)
    assert sorted(target.positions("commit")) == [0, 1]


def test_bytes_without_a_destination_are_read_and_checked(ring: Ring, files: Files) -> None:
    """A slice of a payload is verified by reading the payload whole, which resolves and commits the slice alone."""
    stored = random_tensor(64, 160)
    data, _ = put_payloads(files, [stored], before=3)
    check = check_of(data, payload_offset=3, payload_nbytes=stored.nbytes)
    requests = [
        request_of(stored, payload_offset=3, offsets=(10, 0), lengths=(2, 160)),
        whole_payload_request(check),
    ]
    plan = plan_of(ring, requests, [check])
    assert plan.checks == (check,)
    assert any(chunk.position == NO_DESTINATION for read in plan.reads for chunk in read.chunks)
    target = Target({0: blank(2, 160, dtype=torch.float32)})
    load(ring, files, plan, target)
    assert target.events == [("resolve", 0), ("commit", 0)]
    assert target.committed[0] == naive_payload(stored[10:12], torch.float32)
    corrupt = bytearray(data)
    corrupt[-1] ^= 1
    files.put("file", bytes(corrupt))
    target = Target({0: blank(2, 160, dtype=torch.float32)})
    with pytest.raises(CorruptCheckpointError):
        load(ring, files, plan, target)
    assert target.positions("commit") == []


def test_a_large_payload_without_a_destination_is_read_and_checked(ring: Ring, files: Files) -> None:
    """Reads that may go straight need a destination; without one they go through a slab."""
    ring = replace(ring, slab_nbytes=512 << 10)
    stored = random_tensor(300, 500)
    data, _ = put_payloads(files, [stored])
    check = check_of(data, payload_offset=0, payload_nbytes=stored.nbytes)
    plan = plan_of(ring, [whole_payload_request(check)], [check])
    target = Target({})
    load(ring, files, plan, target)
    assert target.events == []
    files.put("file", data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CorruptCheckpointError):
        load(ring, files, plan, target)


def test_a_read_that_fails_is_raised_and_leaves_nothing_running(ring: Ring, files: Files) -> None:
    """The first in the file of two; what it belonged to is not committed."""
    stored = random_tensor(6 * ring.slab_nbytes // 4)
    put_payloads(files, [stored])
    errors = {n * ring.slab_nbytes: TransferError(f"slab {n}", path="file", errno=errno.EIO) for n in (2, 4)}

    def fail(call: Call) -> None:
        if call.kind == "read" and call.byte_offset in errors:
            raise errors[call.byte_offset]

    files.on_call = fail
    target = Target({0: torch.empty_like(stored)})
    with pytest.raises(TransferError) as caught:
        load(ring, files, plan_of(ring, [request_of(stored)]), target)
    assert caught.value is errors[2 * ring.slab_nbytes]
    assert files.running == 0
    assert target.positions("commit") == []


def test_a_read_still_running_beside_a_failed_one_is_waited_for(ring: Ring, files: Files) -> None:
    """It may be writing into a destination, which is the caller's again when the error is raised."""
    ring = replace(ring, lanes=ring.lanes + 1, threads=ring.threads + 1)
    stored = random_tensor(2 * ring.slab_nbytes // 4)
    put_payloads(files, [stored])
    is_second_running, has_first_failed = threading.Event(), threading.Event()

    def fail(call: Call) -> None:
        if call.kind != "read":
            return
        if call.byte_offset:
            is_second_running.set()
            has_first_failed.wait(5)
            threading.Event().wait(0.05)
        else:
            is_second_running.wait(5)
            has_first_failed.set()
            raise TransferError("first", path="file")

    files.on_call = fail
    with pytest.raises(TransferError, match=r"^first$"):
        load(ring, files, plan_of(ring, [request_of(stored)]), Target({0: torch.empty_like(stored)}))
    assert is_second_running.is_set()
    assert files.running == 0


def test_a_file_shorter_than_the_plan_is_an_error(ring: Ring, files: Files) -> None:
    """Bytes that are not there are no zeros."""
    stored = random_tensor(5000)
    data, _ = put_payloads(files, [stored])
    files.put("file", data[:-1])
    target = Target({0: torch.empty_like(stored)})
    with pytest.raises(TransferError):
        load(ring, files, plan_of(ring, [request_of(stored)]), target)
    assert target.positions("commit") == []


def test_a_file_that_does_not_exist_is_an_error(ring: Ring, files: Files) -> None:
    """Also when it is the second one, with reads of the first on their way."""
    stored = random_tensor(3 * ring.slab_nbytes // 4)
    put_payloads(files, [stored])
    requests = [request_of(stored), request_of(stored, position=1, path="gone")]
    with pytest.raises(CheckpointNotFoundError):
        load(ring, files, plan_of(ring, requests), Target({0: torch.empty_like(stored), 1: torch.empty_like(stored)}))
    assert files.running == 0


@pytest.mark.parametrize("kind", ["resolve", "commit"])
@pytest.mark.parametrize("error", [ValueError("not this one"), KeyboardInterrupt()], ids=repr)
def test_a_target_that_fails_is_raised_and_leaves_nothing_running(
    ring: Ring, files: Files, kind: str, error: BaseException
) -> None:
    """The planner's own error, as it is, after the reads on their way have ended."""
    tensors = [random_tensor(ring.slab_nbytes // 4, seed=seed) for seed in range(6)]
    _, offsets = put_payloads(files, tensors)

    def fail(event: str, position: int) -> None:
        if (event, position) == (kind, 2):
            raise error

    target = Target({n: torch.empty_like(tensor) for n, tensor in enumerate(tensors)}, on_event=fail)
    requests = [request_of(t, position=n, payload_offset=offsets[n]) for n, t in enumerate(tensors)]
    with pytest.raises(type(error)) as caught:
        load(ring, files, plan_of(ring, requests, gap_nbytes=0), target)
    assert caught.value is error
    assert files.running == 0
    # Those before it are committed already, or not yet: straight reads resolve ahead.
    assert target.positions("commit") == [0, 1][: len(target.positions("commit"))]


# --- save and load ---------------------------------------------------------------------------------------------------


@st.composite
def layouts(draw: st.DrawFn) -> torch.Tensor:
    """Tensors of any dtype, shape and strides, with random bits."""
    dtype = draw(st.sampled_from(DTYPES))
    sizes = draw(st.lists(st.integers(0, 12), max_size=3))
    steps = draw(st.lists(st.integers(1, 3), min_size=len(sizes), max_size=len(sizes)))
    order = draw(st.permutations(range(len(sizes))))
    starts = draw(st.lists(st.integers(0, 3), min_size=len(sizes), max_size=len(sizes)))
    base = random_tensor(
        *(start + size * step for start, size, step in zip(starts, sizes, steps, strict=True)), dtype=dtype
    )
    view = base[tuple(slice(start, None, step) for start, step in zip(starts, steps, strict=True))].permute(order)
    if draw(st.booleans()):
        view = view.unsqueeze(0).expand(draw(st.integers(1, 40)), *view.shape)
    return view


@settings(deadline=None, max_examples=60)
@given(
    tensors=st.lists(layouts(), min_size=1, max_size=5),
    ring=st.builds(
        Ring,
        executor=st.sampled_from(sorted(EXECUTORS)),
        lanes=st.integers(1, 3),
        threads=st.integers(1, 3),
        slab_nbytes=st.sampled_from([4096, 8192, 12288]),
    ),
    make_backend=st.sampled_from([lambda: MemoryBackend(alignment_nbytes=1), MemoryBackend, BlockFiles]),
    data=st.data(),
)
def test_boxes_of_saved_tensors_load_as_they_were(
    tensors: list[torch.Tensor], ring: Ring, make_backend: Callable[[], MemoryBackend], data: st.DataObject
) -> None:
    """Any layouts in, any boxes out, into destinations of any strides: bit for bit, checksums included."""
    files = Files(make_backend())
    check_save(ring, files, tensors)
    plan, _ = save_of(tensors, slab_nbytes=ring.slab_nbytes)
    requests, checks, expected, target = [], [], {}, Target({})
    for position, write in enumerate(plan.files[0].writes):
        tensor, sizes = tensors[position], tuple(tensors[position].shape)
        offsets = [data.draw(st.integers(0, size)) for size in sizes]
        lengths = [data.draw(st.integers(0, size - start)) for size, start in zip(sizes, offsets, strict=True)]
        box = tensor[tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))]
        requests.append(
            ReadRequest(
                position,
                "file",
                write.payload_offset,
                tensor.dtype,
                row_major_strides(sizes),
                0,
                tuple(offsets),
                tuple(lengths),
            )
        )
        if write.envelope.payload_nbytes:
            content = files.content("file")
            checks.append(
                check_of(content, payload_offset=write.payload_offset, payload_nbytes=write.envelope.payload_nbytes)
            )
        order = data.draw(st.permutations(range(len(lengths))))
        inverse = sorted(range(len(order)), key=lambda dim: order[dim])
        target.destinations[position] = blank(*(lengths[dim] for dim in order), dtype=tensor.dtype).permute(inverse)
        expected[position] = naive_payload(box, tensor.dtype)
    load(ring, files, plan_of(ring, requests, checks, gap_nbytes=data.draw(st.integers(0, 5000))), target)
    assert {n: naive_payload(t, t.dtype) for n, t in target.destinations.items()} == expected
    assert sorted(target.positions("commit")) == sorted(expected)
