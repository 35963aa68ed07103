import sys

from bench.gpu import main

sys.exit(main())
