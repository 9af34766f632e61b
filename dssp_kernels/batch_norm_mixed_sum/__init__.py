"""mixed_sum with BatchNorm2d inside: y = sum_e sigmoid(m_e) sum_k softmax(alpha_e)_k norm_ek(o_ek)."""
