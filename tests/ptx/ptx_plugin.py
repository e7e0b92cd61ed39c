"""``pytest -p ptx_plugin``: tests of kernels, with the kernels' PTX run on the host; see `ptx_driver`.

Their tensors are the host's, as under Triton's interpreter.
"""

from __future__ import annotations

import os
from importlib import import_module
from pkgutil import iter_modules

os.environ["TRITON_INTERPRET"] = "0"

import gpudcp_kernels
import ptx_driver
from gpudcp_kernels import triton_api

triton_api.ON_HOST = True
# Now: later the tests' own configuration would have them interpreted.
for module in iter_modules(gpudcp_kernels.__path__):
    import_module(f"gpudcp_kernels.{module.name}")
ptx_driver.install()
