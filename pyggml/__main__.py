"""python -m pyggml"""

from pyggml.cli import main

raise SystemExit(main())
