# PYTHON_ARGCOMPLETE_OK
from mssr_basicsr.commands.main import main

raise SystemExit(main())
