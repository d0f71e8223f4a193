"""`python -m roundel.launch` is `roundelrun`."""

import sys

from .run import main

sys.exit(main())
