"""Power steps at will: a kernel that keeps a GPU busy for a given time, through the CUDA driver alone.

The kernel is PTX text that the driver compiles for the card at hand (Volta and later), so neither a CUDA toolkit nor
a framework is needed, only libcuda.so.1, which comes with the driver.
"""

import ctypes
import uuid as uuids
from typing import Any, Protocol, Self

from replay.clock import NS_PER_MS, now_ns
from tracegen.errors import GpuError

_THREADS = 512
_BLOCKS_PER_SM = 2  # with 512 threads all of Turing's 1024 a multiprocessor, so every block runs at once
_WARM_UP_NS = NS_PER_MS
_MULTIPROCESSOR_COUNT = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
_BLOCKING_SYNC = 4  # CU_CTX_SCHED_BLOCKING_SYNC: a host that spins while it waits would disturb who polls the sensors
_NO_LOAD = "use --no-load to measure what can be measured without load"
# Eight independent chains of fused multiply-adds a thread, 2048 of them between looks at the clock (some 10 µs). Their
# sum is stored, or the compiler would leave them out. x = x * x - 1.9 is chaotic within [-1.9, 1.71], so bits keep
# toggling; a chain that settled would draw less.
_FMA = "\n".join(f"    fma.rn.f32 %f{i}, %f{i}, %f{i}, 0fBFF33333;" for i in range(1, 9))
_SUM = "\n".join(f"    add.f32 %f1, %f1, %f{i};" for i in range(2, 9))
_START = "\n".join(
    f"    fma.rn.f32 %f{i}, %f0, 0f3A800000, 0f{bits};"
    for i, bits in enumerate(
        ("3D800000", "3E000000", "3E400000", "3E800000", "3EA00000", "3EC00000", "3EE00000", "3F000000"), 1
    )
)  # thread / 1024 + i / 16
PTX = f"""
.version 7.0
.target sm_70
.address_size 64
.global .align 4 .f32 sink;
.visible .entry burn(.param .u64 duration_ns)
{{
    .reg .pred %p<2>;
    .reg .f32 %f<9>;
    .reg .u64 %t<4>;
    .reg .u32 %n<2>;
    ld.param.u64 %t0, [duration_ns];
    mov.u64 %t1, %globaltimer;
    add.u64 %t2, %t1, %t0;
    mov.u32 %n1, %tid.x;
    cvt.rn.f32.u32 %f0, %n1;
{_START}
again:
    mov.u32 %n0, 0;
work:
{_FMA}
    add.u32 %n0, %n0, 1;
    setp.lt.u32 %p0, %n0, 256;
    @%p0 bra work;
    mov.u64 %t3, %globaltimer;
    setp.lt.u64 %p1, %t3, %t2;
    @%p1 bra again;
{_SUM}
    st.global.f32 [sink], %f1;
    ret;
}}
"""


class Load(Protocol):
    """Something that makes one GPU draw power."""

    def burn(self, duration_ns: int) -> tuple[int, int]:
        """Keep the GPU busy for `duration_ns`; return when it began and ended, on `CLOCK_MONOTONIC`."""


class CudaLoad:
    """`Load` over libcuda; a context manager. The GPU is left alone until the first `burn`."""

    def __init__(self, uuid: str) -> None:
        """`uuid` as NVML writes it: CUDA counts the cards in an order of its own.

        Raises `GpuError` without libcuda or when CUDA does not see the card.
        """
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise GpuError(f"load needs NVIDIA's CUDA driver library ({error}); {_NO_LOAD}") from None
        self._call("cuInit", 0)
        self._device = self._find(uuid)
        self._context, self._module, self._kernel = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        self._blocks = 0

    def __enter__(self) -> Self:
        """The load."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give the GPU back."""
        self.close()

    def close(self) -> None:
        """Release the context on the GPU; closing twice is no error."""
        if self._context:
            self._context = ctypes.c_void_p()
            self._cuda.cuCtxSetCurrent(None)
            self._cuda.cuDevicePrimaryCtxRelease_v2(self._device)  # unloads the module too

    def burn(self, duration_ns: int) -> tuple[int, int]:
        """Keep every multiprocessor busy for `duration_ns`; when the kernel was on its way, and when it had ended.

        Raises `GpuError` when the driver refuses or the kernel fails.
        """
        if not self._context:
            self._open()
            self._run(_WARM_UP_NS)  # the first launch loads the kernel, which takes milliseconds
        return self._run(duration_ns)

    def _run(self, duration_ns: int) -> tuple[int, int]:
        duration = ctypes.c_uint64(duration_ns)
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(duration))
        self._call("cuCtxSetCurrent", self._context)
        grid, block = (self._blocks, 1, 1), (_THREADS, 1, 1)
        self._call("cuLaunchKernel", self._kernel, *grid, *block, 0, None, arguments, None)
        start_ns = now_ns()
        self._call("cuStreamSynchronize", None)
        return start_ns, now_ns()

    def _open(self) -> None:
        """Make a context on the GPU and compile the kernel."""
        count = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(count), _MULTIPROCESSOR_COUNT, self._device)
        self._blocks = _BLOCKS_PER_SM * count.value
        self._call("cuDevicePrimaryCtxSetFlags_v2", self._device, _BLOCKING_SYNC)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        try:
            self._call("cuCtxSetCurrent", self._context)
            self._call("cuModuleLoadData", ctypes.byref(self._module), PTX.encode())
            self._call("cuModuleGetFunction", ctypes.byref(self._kernel), self._module, b"burn")
        except GpuError:
            self.close()
            raise

    def _find(self, uuid: str) -> ctypes.c_int:
        """CUDA's handle of the card that NVML calls `uuid`."""
        count, device, found = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(16)
        self._call("cuDeviceGetCount", ctypes.byref(count))
        seen = []
        for ordinal in range(count.value):
            self._call("cuDeviceGet", ctypes.byref(device), ordinal)
            self._call("cuDeviceGetUuid_v2", found, device)
            seen.append(f"GPU-{uuids.UUID(bytes=found.raw)}")
            if seen[-1] == uuid:
                return device
        raise GpuError(
            f"CUDA does not see {uuid}, only {', '.join(seen) or 'no GPU at all'}: check CUDA_VISIBLE_DEVICES, "
            f"or {_NO_LOAD}"
        )

    def _call(self, name: str, *arguments: Any) -> None:
        """Call the driver; its errors become one clear line."""
        try:
            code = getattr(self._cuda, name)(*arguments)
        except AttributeError:
            raise GpuError(f"the CUDA driver is too old: it has no {name}; update it, or {_NO_LOAD}") from None
        if code:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(code, ctypes.byref(text))
            why = text.value.decode() if text.value else f"error {code}"
            raise GpuError(f"{name} failed: {why}; {_NO_LOAD}")
