# SPDX-License-Identifier: Apache-2.0
"""``python3 -m holdfast`` is the ``holdfast`` command."""

from holdfast.cli import main

if __name__ == "__main__":
    main()
