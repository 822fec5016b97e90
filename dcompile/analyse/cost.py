"""Prices in microseconds: a roofline for compute (Williams et al., CACM 2009), alpha-beta links for collectives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dcompile.analyse.flops import work
from dcompile.collectives.cost import LinkModel
from dcompile.collectives.nodes import Kind, Start, Wait
from dcompile.collectives.rules import payload_bytes
from dcompile.errors import CompilerBug
from dcompile.ir.graph import Graph
from dcompile.ir.nodes import Extern, Node, View
from dcompile.ir.types import DType, Value

DEFAULT_LINK = "*"
"""Label of the link model used for groups that have none of their own."""


@dataclass(frozen=True)
class Roofline:
    """One processor as a rank uses it.

    Attributes:
        flops_per_us: scalar arithmetic of generated loops, in the weights of ``ops.OPS``.
        bytes_per_us: memory bandwidth.
        launch_us: fixed time of one generated kernel, and of a collective's launch on the compute lane.
        call_us: fixed time of one library call.
        matmul_flops_per_us: library matrix products by element type; types not named run at ``flops_per_us``.
        multiprocessors: of a GPU.
    """

    flops_per_us: float
    bytes_per_us: float
    launch_us: float
    call_us: float
    matmul_flops_per_us: Mapping[DType, float] = field(default_factory=dict)
    multiprocessors: int = 0


@dataclass(frozen=True)
class CostModel:
    """Predicted times; the same on every rank for the same graph.

    Attributes:
        compute: device type (``"cpu"``, ``"cuda"``) to its roofline.
        links: group label to its link; ``DEFAULT_LINK`` for all groups not named.
    """

    compute: Mapping[str, Roofline]
    links: Mapping[str, LinkModel]

    @staticmethod
    def analytical(device: str, world: int) -> CostModel:
        """Documented default numbers for a program on ``device`` (``"cpu"`` or ``"cuda"``) over ``world`` ranks.

        Raises:
            CompilerBug: no numbers for that device.
        """
        if device == "cpu":
            return CostModel({"cpu": CPU_CORE}, {DEFAULT_LINK: GLOO_LOOPBACK})
        if device == "cuda":
            link = NCCL_NVLINK if world <= RANKS_PER_NVLINK_DOMAIN else NCCL_NETWORK
            return CostModel({"cuda": H200, "cpu": CPU_CORE}, {DEFAULT_LINK: link})
        raise CompilerBug(f"no cost numbers for device {device!r}")

    def node_us(self, node: Node, graph: Graph) -> float:
        """Time ``node`` occupies the compute lane, at the size hints of ``graph``; views and waits themselves are free.

        A Start costs its launch here; its transfer is on the communication lane (``transfer_us``).

        Raises:
            CompilerBug: no numbers for the node's device.
        """
        if isinstance(node, View | Wait):
            return 0.0
        roof = self.roofline(_device(node, graph))
        if isinstance(node, Start):
            return roof.launch_us
        done = work(node, graph)
        if isinstance(node, Extern):
            fixed_us = roof.call_us
        else:
            fixed_us = roof.launch_us if done.nbytes or done.flops else 0.0
        arithmetic_us = done.flops / roof.flops_per_us
        arithmetic_us += done.matmul_flops / roof.matmul_flops_per_us.get(done.dtype, roof.flops_per_us)
        return fixed_us + max(arithmetic_us, done.nbytes / roof.bytes_per_us)

    def transfer_us(self, start: Start, graph: Graph) -> float:
        """Time from the launch of ``start`` to its completion with nothing else running."""
        link = self.link(start.group.label).by(start.via)
        return link.transfer_us(start.kind, payload_bytes(start, graph), start.group.size)

    def contention(self, start: Start) -> float:
        """Share of the transfer time of ``start`` that is added to compute running beside it."""
        return self.link(start.group.label).by(start.via).contention

    def link(self, label: str) -> LinkModel:
        """The link of a group.

        Raises:
            CompilerBug: neither the group nor ``DEFAULT_LINK`` has one.
        """
        found = self.links.get(label) or self.links.get(DEFAULT_LINK)
        if found is None:
            raise CompilerBug(f"no link numbers for group {label!r}")
        return found

    def roofline(self, device: str) -> Roofline:
        """The numbers of a device type.

        Raises:
            CompilerBug: there are none.
        """
        if device not in self.compute:
            raise CompilerBug(f"no cost numbers for device {device!r}")
        return self.compute[device]


def _device(node: Node, graph: Graph) -> str:
    """Where ``node`` runs: the first tensor it makes, else the first it reads, else the processor."""
    for item in node.defs:
        if isinstance(item, Value):
            return item.device
    for name in node.operands:
        if isinstance(graph.defs.get(name), Value):
            return graph.value(name).device
    return "cpu"


CPU_CORE = Roofline(
    flops_per_us=10_000,
    bytes_per_us=20_000,
    launch_us=1.0,
    call_us=3.5,
    matmul_flops_per_us={DType.F32: 90_000, DType.BF16: 180_000, DType.F64: 45_000},
)
"""One core of a cloud server with AVX-512 (AMD EPYC), one thread a rank, two ranks at once, torch 2.13, best and median
of 20. matmul: 512^3 and 1024^3 f32 91-102 GFLOP/s, 512^3 bf16 214 GFLOP/s; f64 taken as half of f32. bytes: read plus
write of a 64 MiB tensor 23-24.5 GB/s (65-76 GB/s from cache). flops: exp of 16 Ki floats 18 us is 0.9 elements a
nanosecond, times the weight 12 of exp. call: a 4x4 ``mm.out`` 3.3-3.9 us, a 16-element ``relu`` 2.9-3.4 us. launch: an
estimate for a foreign function call from Python."""

GLOO_LOOPBACK = LinkModel(
    alpha_us=300,
    bytes_per_us=1_500,
    contention=0.75,
    hop_us=150,
    slowdown={Kind.ALL_GATHER: 3.3, Kind.REDUCE_SCATTER: 4.0, Kind.BROADCAST: 0.47, Kind.ALL_TO_ALL: 1.3},
)
"""gloo over loopback TCP, two ranks on two cores, one thread each, torch 2.13, best and median of 8-30, in us: all-
reduce 4 KiB 325-500, 1 MiB 520-2400, 16 MiB 8700-13600, 64 MiB 41600-50100 (1.3-1.6 GB/s); all-gather of a 64 MiB
shard 137000-172000, reduce-scatter of 64 MiB 98000-107000 (of 4 MiB 3100-5600), broadcast 18100-23700, all-to-all
26500-31100. hop: half of an empty all-reduce, which is two steps. contention: the time added to 512^3 matmuls that
last about four all-reduces, as a share of one all-reduce, medians of 40: 1 MiB 1.4, 4 MiB 0.90, 8 MiB 0.69, 28 MiB
0.66; the number is the mean of the last three, the sizes of buckets. gloo copies and reduces on a core that compute
wants; with cores to spare it is less, and a measured table should replace these numbers then."""

H200 = Roofline(
    flops_per_us=3.0e7,
    bytes_per_us=3.8e6,
    launch_us=4.0,
    call_us=6.0,
    matmul_flops_per_us={DType.BF16: 7.4e8, DType.F16: 7.4e8, DType.F32: 5.0e7, DType.F64: 5.0e7},
    multiprocessors=132,
)
"""One H200-class GPU. bf16 matmul: four 8192^3 in 5.95 ms are 739 TFLOP/s. Others are estimates: 80 % of the data
sheet's 4.8 TB/s, half of its 67 TFLOP/s for scalar code, three quarters for f32 and f64 matmuls, a few us a launch."""

NCCL_NVLINK = LinkModel(
    alpha_us=33,
    bytes_per_us=332_000,
    contention=0.75,
    hop_us=1.0,
    slowdown={Kind.ALL_GATHER: 1.15, Kind.REDUCE_SCATTER: 1.15},
)
"""NCCL between two H200 over NVLink, bf16, in us: all-reduce 4 KiB 38, 1 MiB 35, 16 MiB 75, 64 MiB 252, 1 GiB 3236
(332 GB/s); all-gather and reduce-scatter of a 1 GiB shard 3714. contention: a 256 MiB all-reduce (970 alone) beside
5950 of matmuls added 750. hop is an estimate (a write over NVLink and a flag poll)."""

NVLINK_PEERS = LinkModel(alpha_us=25, bytes_per_us=369_000, contention=0.25, hop_us=5.0)
"""Copy engines between two H200 over NVLink: 512 MiB in 1460 us (369 GB/s); beside 5950 us of matmuls they added 360.
alpha is an estimate: two barriers and a copy. A link has it only where ``calibrate`` found that peers map memory."""

NCCL_NETWORK = LinkModel(
    alpha_us=30,
    bytes_per_us=28_500,
    contention=0.15,
    hop_us=5.0,
    slowdown={Kind.ALL_GATHER: 1.14, Kind.REDUCE_SCATTER: 1.14},
)
"""NCCL through host memory, about a 200-400 Gb/s network: 30 us below 64 KiB, 28-29 GB/s all-reduce, 25 GB/s
all-gather. contention: a 256 MiB all-reduce of 9220 us beside 5950 us of matmuls ended after 10380 us,
1160 us more than alone: 0.13, rounded up. hop is an estimate (one network round)."""

RANKS_PER_NVLINK_DOMAIN = 8
"""GPUs of one HGX board; larger worlds are taken to cross the network."""
