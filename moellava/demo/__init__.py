# SPDX-License-Identifier: Apache-2.0
"""The demo: small parts, trained on scans of handwritten digits that come with scikit-learn, and asked about others."""
