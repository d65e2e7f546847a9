"""LowRankSOAP against SOAP written out densely in float64."""
