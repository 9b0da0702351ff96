#!/usr/bin/env python
"""`python -m dcnv2_d2.demo` of this checkout."""

from dcnv2_d2.demo import main

if __name__ == "__main__":
    main()
