"""Print the values of ATEN_CPU_CAPABILITY that this processor can be run with, plainest first."""

import torch

KNOWN = ("default", "avx2", "avx512")


def capabilities(best: str) -> tuple[str, ...]:
    """Instruction sets up to the best one; other processors than x86 have one of their own."""
    return KNOWN[: KNOWN.index(best) + 1] if best in KNOWN else ("default",)


if __name__ == "__main__":
    print(*capabilities(torch.backends.cpu.get_cpu_capability().lower()))  # noqa: T201
