"""timm_branches"""
