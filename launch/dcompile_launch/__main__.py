import sys

from dcompile_launch.main import main

sys.exit(main())
