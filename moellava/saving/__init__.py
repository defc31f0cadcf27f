# SPDX-License-Identifier: Apache-2.0
"""How checkpoints get to a disk and to the Hub: whole or not at all, with the code that they need."""
