import sys

from bench.e2e import main

sys.exit(main())
