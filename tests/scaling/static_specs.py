"""Static frequency methods as specs, with at least one for each form in a file."""

STATIC = [
    "none",
    "linear:4",
    "ntk:4",
    "ntk-fixed:4",
    "ntk-mixed:4",
    "ntk-by-parts:4",
    "yarn:4",
    "yarn:4,attention_factor=1.3",
    "yarn:4,mscale=0.8,mscale_all_dim=0.5",
    "yarn:4,truncate=false",
    "yarn:4,beta_fast=20",
    "llama3:4",
    "base:2e5",
    "critical-base:4x",
    "mrrope:4",
    "alpharope:4",
    "dprope:4",
    "yarn:4|resonance",
    "cope",
]
