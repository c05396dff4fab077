"""Has the peak rates of GPUs in bf16, by the name that the driver reports. perf/mfu is computed from these rates."""

import re

# Dense TFLOP/s (without sparsity) in bf16 with fp32 sums, from NVIDIA's data sheets. The first key whose words are all in
# the card's name is used. A key with more words must therefore come before a key with only some of these words.
PEAK_BF16_TFLOPS: dict[str, float] = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "GH200": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 PCIE": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800 PCIE": 756.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A30": 165.0,
    "A40": 150.0,
    "A10": 125.0,
    "A10G": 70.0,
    "L4": 121.0,
    "L40": 181.0,
    "L40S": 362.0,
}
PARTIAL = "MIG"  # this word is in the name of a MIG part of a card, whose peak rate is below that of the whole card


def peak_tflops(card: str) -> float | None:
    """Returns the dense peak rate of one GPU in bf16, in TFLOP/s. Returns None if the table lacks the card, and for a MIG
    part of a card. `card` is a name from `torch.cuda.get_device_name`, for example "NVIDIA H100 80GB HBM3"."""
    words = set(re.split(r"[\s-]+", card.upper()))
    known = (peak for name, peak in PEAK_BF16_TFLOPS.items() if words.issuperset(name.split()))
    return None if PARTIAL in words else next(known, None)
