// One adder layer with its epilogue, a tap a clock: the simplest hardware with the meaning of SEMANTICS.md.
//
// acc = -sum |x - w|; t = acc * multiplier + bias + r * residual_multiplier; y = clamp((t + 2^(shift-1)) >>> shift).

`timescale 1ns / 1ns

// |a - b| of unsigned numbers.
module absolute_difference #(parameter BITS = 8) (
    input [BITS-1:0] a,
    input [BITS-1:0] b,
    output [BITS-1:0] difference
);
    assign difference = a > b ? a - b : b - a;
endmodule

module requantise #(
    parameter ACC_BITS = 32,
    parameter TOTAL_BITS = 64,
    parameter SHIFT = 1,
    parameter LOW = 0,
    parameter HIGH = 255
) (
    input signed [ACC_BITS-1:0] accumulator,
    input signed [31:0] multiplier,
    input signed [63:0] bias,
    input [7:0] residual,
    input signed [31:0] residual_multiplier,
    output [7:0] result
);
    wire signed [TOTAL_BITS-1:0] half = 1'b1 <<< (SHIFT - 1);
    wire signed [8:0] r = {1'b0, residual};
    wire signed [TOTAL_BITS-1:0] total = accumulator * multiplier + bias + r * residual_multiplier;
    wire signed [TOTAL_BITS-1:0] shifted = (total + half) >>> SHIFT;
    assign result = shifted < LOW ? LOW : shifted > HIGH ? HIGH : shifted[7:0];
endmodule

module adder_layer #(
    parameter C = 1, H = 1, W = 1,                                 // input map
    parameter O = 1, OH = 1, OW = 1,                               // output map
    parameter KH = 1, KW = 1, STRIDE_H = 1, STRIDE_W = 1, TOP = 0, LEFT = 0, DILATION_H = 1, DILATION_W = 1,
    parameter PAD_VALUE = 0, RESIDUAL = 0, RESIDUAL_MULTIPLIER = 0,
    parameter ACC_BITS = 32, TOTAL_BITS = 64, SHIFT = 1, LOW = 0, HIGH = 255
) (
    input clock,
    input reset,
    output reg valid,                        // accumulator, result and address are those of one output
    output reg [31:0] address,
    output reg signed [ACC_BITS-1:0] accumulator,
    output [7:0] result,
    output reg done
);
    reg [7:0] x [0:C*H*W-1];
    reg [7:0] weight [0:O*C*KH*KW-1];
    reg [31:0] multiplier [0:O-1];
    reg [63:0] bias [0:O-1];
    reg [7:0] residual [0:O*OH*OW-1];

    integer o, oy, ox, c, i, j;
    reg signed [ACC_BITS-1:0] sum;
    wire signed [31:0] row = oy * STRIDE_H - TOP + i * DILATION_H;
    wire signed [31:0] column = ox * STRIDE_W - LEFT + j * DILATION_W;
    wire outside = row < 0 || row >= H || column < 0 || column >= W;
    wire [7:0] pixel = outside ? PAD_VALUE : x[(c * H + row) * W + column];
    wire [7:0] tap;
    wire last = c == C - 1 && i == KH - 1 && j == KW - 1;

    absolute_difference #(8) difference (pixel, weight[((o * C + c) * KH + i) * KW + j], tap);
    requantise #(ACC_BITS, TOTAL_BITS, SHIFT, LOW, HIGH) epilogue (
        accumulator, multiplier[address / (OH * OW)], bias[address / (OH * OW)],
        RESIDUAL ? residual[address] : 8'd0, RESIDUAL_MULTIPLIER, result);

    wire signed [ACC_BITS-1:0] next = sum - $signed({1'b0, tap});

    always @(posedge clock) begin
        valid <= 0;
        if (reset) begin
            o <= 0; oy <= 0; ox <= 0; c <= 0; i <= 0; j <= 0;
            sum <= 0; done <= 0;
        end else if (!done) begin
            sum <= last ? 0 : next;
            j <= j == KW - 1 ? 0 : j + 1;
            if (j == KW - 1) i <= i == KH - 1 ? 0 : i + 1;
            if (j == KW - 1 && i == KH - 1) c <= c == C - 1 ? 0 : c + 1;
            if (last) begin
                valid <= 1;
                accumulator <= next;
                address <= (o * OH + oy) * OW + ox;
                ox <= ox == OW - 1 ? 0 : ox + 1;
                if (ox == OW - 1) oy <= oy == OH - 1 ? 0 : oy + 1;
                if (ox == OW - 1 && oy == OH - 1) begin
                    o <= o + 1;
                    done <= o == O - 1;
                end
            end
        end
    end
endmodule
