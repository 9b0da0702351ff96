#!/usr/bin/env python
"""`python -m dcnv2_d2.train` of this checkout."""

from dcnv2_d2.train import main

if __name__ == "__main__":
    main()
