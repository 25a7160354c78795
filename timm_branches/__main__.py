"""`python -m timm_branches`, the same as `timm-branches`."""

import sys

from timm_branches.cli import main

sys.exit(main())
