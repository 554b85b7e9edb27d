"""What can be proven: pixels that no color can turn, and patches that double masking withstands."""

from weakspot.proofs.allowed_colors import AllowedColors
from weakspot.proofs.certificate import ColorBoxes, PixelCertificate
from weakspot.proofs.certificate_check import CertificateCheck, check_certificate
from weakspot.proofs.mask_set import MaskSet
from weakspot.proofs.pixel_proofs import certify_pixels
from weakspot.proofs.two_masks import DoubleMasking, PatchCertificate, certify_patches

__all__ = [
    "AllowedColors",
    "CertificateCheck",
    "ColorBoxes",
    "DoubleMasking",
    "MaskSet",
    "PatchCertificate",
    "PixelCertificate",
    "certify_patches",
    "certify_pixels",
    "check_certificate",
]
