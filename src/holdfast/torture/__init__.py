# SPDX-License-Identifier: Apache-2.0
"""Kill campaigns: real processes, real SIGKILL, judged from outside."""
