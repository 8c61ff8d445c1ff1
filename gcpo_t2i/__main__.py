"""`python -m gcpo_t2i` is `gcpo-t2i`."""

from __future__ import annotations

import sys

from gcpo_t2i.cli import main

sys.exit(main())
