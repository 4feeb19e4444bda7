# SPDX-License-Identifier: Apache-2.0
"""Public conformance suites: subclass one, give it a fixture, and pytest runs it."""
