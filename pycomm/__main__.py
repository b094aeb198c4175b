from pycomm.cli.main import main

raise SystemExit(main())
