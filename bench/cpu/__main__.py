import sys

from bench.cpu.run import main

sys.exit(main())
