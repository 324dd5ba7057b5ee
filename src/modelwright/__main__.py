"""python -m modelwright"""

from modelwright.cli.app import main

main()
