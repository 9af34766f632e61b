"""The gated, weighted sum of candidate operations: y = sum_e sigmoid(m_e) sum_k softmax(alpha_e)_k o_ek."""
