"""python -m modelwright"""

from modelwright.cli import main

main()
