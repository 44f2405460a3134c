"""Lets processes that a test spawns find the test's own module."""

import sys
from pathlib import Path

# Last in the path, behind an installed package: in front, the source folder dynloss_ext/ would hide it.
sys.path.append(str(Path(__file__).parent.parent))
