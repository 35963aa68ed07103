"""`python -m tests.soak`: see `tests.soak.run`."""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before anything imports jax

from tests.soak.run import main

sys.exit(main())
