// The scoreboard's duty in net/http, go-redis and franz-go. How it is tuned and what it leaves out: ../README.md.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/redis/go-redis/v9"
	"github.com/twmb/franz-go/pkg/kgo"
	"golang.org/x/sync/singleflight"
)

const (
	maxTokens    = 65536
	maxBodyBytes = 16384
	maxScore     = 1<<53 - 1
)

func setting(name, otherwise string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return otherwise
}

// caller is whom a token names, and until when.
type caller struct {
	subject   string
	expiresAt time.Time
}

// callers verifies a token once and then knows it by the header's text.
type callers struct {
	known  sync.Map
	count  atomic.Int64
	secret []byte
	parser *jwt.Parser
}

func (c *callers) of(authorization string) *caller {
	if known, ok := c.known.Load(authorization); ok {
		found := known.(*caller)
		if time.Now().Before(found.expiresAt) {
			return found
		}
		c.known.Delete(authorization)
		c.count.Add(-1)
		return nil
	}
	token, ok := strings.CutPrefix(authorization, "Bearer ")
	if !ok {
		return nil
	}
	claims := jwt.RegisteredClaims{}
	_, err := c.parser.ParseWithClaims(token, &claims, func(*jwt.Token) (any, error) { return c.secret, nil })
	if err != nil || claims.Subject == "" {
		return nil
	}
	found := &caller{claims.Subject, claims.ExpiresAt.Time}
	if c.count.Add(1) > maxTokens {
		c.known.Clear()
		c.count.Store(1)
	}
	c.known.Store(authorization, found)
	return found
}

type update struct {
	PlayerID   string `json:"playerId"`
	ScoreDelta *int64 `json:"scoreDelta"`
}

type answer struct {
	PlayerID string `json:"playerId"`
	NewScore int64  `json:"newScore"`
}

type event struct {
	PlayerID   string `json:"playerId"`
	ScoreDelta int64  `json:"scoreDelta"`
	NewScore   int64  `json:"newScore"`
	At         int64  `json:"at"`
}

type entry struct {
	PlayerID string `json:"playerId"`
	Score    int64  `json:"score"`
}

type server struct {
	redis      *redis.Client // reads: shared, so too few for pipelines
	pipeline   *redis.AutoPipeliner
	script     *redis.Script
	kafka      *kgo.Client
	callers    *callers
	reads      singleflight.Group
	prefix     string
	board      string
	intervalUs int64
	windowUs   int64
}

func reply(w http.ResponseWriter, status int, body []byte) {
	header := w.Header()
	header["Content-Type"] = []string{"application/json"}
	header["Content-Length"] = []string{strconv.Itoa(len(body))}
	w.WriteHeader(status)
	w.Write(body)
}

func refuse(w http.ResponseWriter, status int, detail string) {
	body, _ := json.Marshal(map[string]string{"detail": detail})
	reply(w, status, body)
}

func (s *server) updateScore(w http.ResponseWriter, r *http.Request) {
	caller := s.callers.of(r.Header.Get("Authorization"))
	if caller == nil {
		w.Header().Set("WWW-Authenticate", "Bearer")
		refuse(w, http.StatusUnauthorized, "no valid token")
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBodyBytes))
	if err != nil {
		refuse(w, http.StatusRequestEntityTooLarge, "too large")
		return
	}
	var asked update
	err = json.Unmarshal(body, &asked)
	if err != nil || asked.PlayerID == "" || len(asked.PlayerID) > 512 || asked.ScoreDelta == nil ||
		*asked.ScoreDelta > maxScore || *asked.ScoreDelta < -maxScore {
		refuse(w, http.StatusBadRequest, "expected playerId and scoreDelta")
		return
	}
	if caller.subject != asked.PlayerID {
		refuse(w, http.StatusForbidden, "not your score")
		return
	}
	keys := []string{s.prefix + ":limit:" + caller.subject, s.prefix + ":score:" + asked.PlayerID, s.board}
	ctx := r.Context()
	result, err := s.script.Run(ctx, s.pipeline, keys, asked.PlayerID, *asked.ScoreDelta, s.intervalUs, s.windowUs).Int64Slice()
	if err != nil || len(result) != 2 {
		log.Println("Redis:", err)
		refuse(w, http.StatusServiceUnavailable, "Redis failed")
		return
	}
	if result[0] == 0 {
		w.Header().Set("Retry-After", strconv.FormatInt((result[1]+999_999)/1_000_000, 10))
		refuse(w, http.StatusTooManyRequests, "slow down")
		return
	}
	value, _ := json.Marshal(event{asked.PlayerID, *asked.ScoreDelta, result[1], time.Now().UnixMilli()})
	record := &kgo.Record{Key: []byte(asked.PlayerID), Value: value}
	// The event outlives the request, so its context must not be the request's.
	s.kafka.Produce(context.Background(), record, func(_ *kgo.Record, err error) {
		if err != nil {
			log.Println("event lost:", err)
		}
	})
	text, _ := json.Marshal(answer{asked.PlayerID, result[1]})
	reply(w, http.StatusOK, text)
}

func (s *server) leaderboard(w http.ResponseWriter, r *http.Request) {
	limit := 10
	if text := r.URL.Query().Get("limit"); text != "" {
		number, err := strconv.Atoi(text)
		if err != nil || number < 1 || number > 1000 {
			refuse(w, http.StatusBadRequest, "limit: 1 to 1000")
			return
		}
		limit = number
	}
	// One read of Redis is shared by all who ask while it is under way, and so is its text.
	text, err, _ := s.reads.Do(strconv.Itoa(limit), func() (any, error) {
		members, err := s.redis.ZRevRangeWithScores(context.Background(), s.board, 0, int64(limit-1)).Result()
		if err != nil {
			return nil, err
		}
		entries := make([]entry, len(members))
		for i, member := range members {
			entries[i] = entry{member.Member.(string), int64(member.Score)}
		}
		return json.Marshal(entries)
	})
	if err != nil {
		log.Println("Redis:", err)
		refuse(w, http.StatusServiceUnavailable, "Redis failed")
		return
	}
	reply(w, http.StatusOK, text.([]byte))
}

func main() {
	rate, err := strconv.ParseFloat(setting("RATE_LIMIT_PER_SECOND", "10"), 64)
	if err != nil {
		log.Fatal(err)
	}
	burst, err := strconv.ParseInt(setting("RATE_LIMIT_BURST", "20"), 10, 64)
	if err != nil {
		log.Fatal(err)
	}
	var intervalUs int64
	if rate > 0 {
		intervalUs = int64(1e6 / rate)
	}
	lua, err := os.ReadFile(setting("LUA_SCRIPT", "bench/peers/apply_update.lua"))
	if err != nil {
		log.Fatal(err)
	}
	client := redis.NewClient(&redis.Options{
		Addr: setting("REDIS_HOST", "127.0.0.1") + ":" + setting("REDIS_PORT", "6379"),
	})
	if err := client.Ping(context.Background()).Err(); err != nil {
		log.Fatal(err)
	}
	pipeline, err := client.AutoPipeline()
	if err != nil {
		log.Fatal(err)
	}
	kafka, err := kgo.NewClient(
		kgo.SeedBrokers(strings.Split(setting("KAFKA_BROKERS", "127.0.0.1:9092"), ",")...),
		kgo.DefaultProduceTopic(setting("KAFKA_TOPIC", "score-updates")),
		kgo.ProducerLinger(10*time.Millisecond),
		kgo.ProducerBatchCompression(kgo.NoCompression()),
		kgo.MaxBufferedRecords(1_000_000),
	)
	if err != nil {
		log.Fatal(err)
	}
	if err := kafka.Ping(context.Background()); err != nil {
		log.Fatal(err)
	}
	prefix := setting("KEY_PREFIX", "go")
	s := &server{
		redis:    client,
		pipeline: pipeline,
		script:   redis.NewScript(string(lua)),
		kafka:    kafka,
		callers: &callers{
			secret: []byte(os.Getenv("JWT_SECRET")),
			parser: jwt.NewParser(jwt.WithValidMethods([]string{"HS256"}), jwt.WithExpirationRequired()),
		},
		prefix:     prefix,
		board:      prefix + ":leaderboard",
		intervalUs: intervalUs,
		windowUs:   intervalUs * burst,
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /update-score", s.updateScore)
	mux.HandleFunc("GET /leaderboard", s.leaderboard)
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { reply(w, http.StatusOK, []byte(`"ok"`)) })
	web := &http.Server{Addr: setting("HOST", "127.0.0.1") + ":" + setting("PORT", "8080"), Handler: mux}
	stop, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer cancel()
	go func() {
		<-stop.Done()
		web.Shutdown(context.Background())
	}()
	if err := web.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		log.Fatal(err)
	}
	kafka.Flush(context.Background())
}
