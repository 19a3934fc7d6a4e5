"""`python -m service` is the command `onetime`."""

from service.cli import main

main()
