/*
What decode and prefill of the gated delta net share.
*/
#pragma once

constexpr int MAX_TAPS = 8;          /* of the convolution */
constexpr float L2_NORM_EPS = 1e-6f; /* the model's, whatever rms_norm_eps is */
