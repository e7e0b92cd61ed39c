"""Kernels in these tests run on the host: Triton's interpreter is switched on before the first of them is imported."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")

os.environ["TRITON_INTERPRET"] = "1"
