# SPDX-License-Identifier: Apache-2.0
"""What is checked of files that nobody vouches for, before anything is opened or built because of them."""
